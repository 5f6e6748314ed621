"""A program that writes to the file, with Python's SQLite: one tag for each local transaction.

Usage: writer.py FILE NAME TRANSACTIONS SEED ROWS_MAX
"""

import random
import sqlite3
import sys

path, name, transactions, seed, rows_max = sys.argv[1:]
transactions, rows_max = int(transactions), int(rows_max)
chance = random.Random(f"{name} {seed}")
connection = sqlite3.connect(path, timeout=120, isolation_level=None)


def sql(text, *values):
    return connection.execute(text, values).fetchall()


def configure():
    # A small cache spills: frames are in the WAL before their commit, and overwritten.
    sql(f"PRAGMA cache_size = {chance.choice([5, 10, 100, 2000])}")
    sql(f"PRAGMA synchronous = {chance.choice(['OFF', 'NORMAL', 'NORMAL', 'FULL'])}")
    sql(f"PRAGMA wal_autocheckpoint = {chance.choice([0, 1, 10, 100, 1000])}")
    sql(f"PRAGMA journal_size_limit = {chance.choice([-1, 0, 50_000])}")
    connection.execute(f"PRAGMA busy_timeout = 120000")


def insert(tag, rows):
    pad = chance.choice([0, 10, 500, 3000])
    connection.executemany(
        "INSERT INTO work(tag, pad) VALUES (?, zeroblob(?))", ((tag, pad) for _ in range(rows))
    )


def rows():
    if chance.random() < 0.7:
        return chance.randint(1, 3)
    if chance.random() < 0.9:
        return chance.randint(1, max(1, rows_max // 20))
    return chance.randint(1, rows_max)


def transaction(tag):
    sql("BEGIN IMMEDIATE")
    insert(tag, rows())
    while chance.random() < 0.3:
        sql("SAVEPOINT inner")
        insert(tag, rows())
        if chance.random() < 0.5:
            sql("ROLLBACK TO inner")
        sql("RELEASE inner")
    if chance.random() < 0.1:
        sql("UPDATE work SET pad = zeroblob(20) WHERE rowid % 7 = ? AND rowid > ?", chance.randint(0, 6), 100)
    sql("ROLLBACK" if chance.random() < 0.15 else "COMMIT")


configure()
for number in range(transactions):
    tag = f"{name} {number}"
    kind = chance.random()
    if kind < 0.8:
        transaction(tag)
    elif kind < 0.9:
        # Without BEGIN.
        sql("INSERT INTO work(tag) VALUES (?)", tag)
    else:
        sql("INSERT INTO other(v) VALUES (?)", tag)
    if chance.random() < 0.1:
        connection.execute("PRAGMA busy_timeout = 3")
        mode = chance.choice(["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
        sql(f"PRAGMA wal_checkpoint({mode})")
        connection.execute("PRAGMA busy_timeout = 120000")
    if chance.random() < 0.05:
        configure()
