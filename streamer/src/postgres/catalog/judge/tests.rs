use super::{
    super::facts::{Attribute, Facts, IndexFacts, Locale, Relation, Type},
    *,
};

/// Facts about tables `public.t` (and more, with other OIDs), in the making.
struct Made(Facts);

impl Made {
    fn new() -> Self {
        let mut facts = Facts {
            database: locale('c', "en_US.UTF-8"),
            ..Facts::default()
        };
        for (oid, name) in [
            (20, "int8"),
            (23, "int4"),
            (25, "text"),
            (701, "float8"),
            (2205, "regclass"),
        ] {
            facts.types.insert(oid, plain(name));
        }
        facts.types.insert(
            603,
            Type {
                delimiter: ';',
                ..plain("box")
            },
        );
        Made(facts).relation(100_000, "public", "t")
    }

    fn relation(mut self, oid: u32, schema: &str, name: &str) -> Self {
        self.0.relations.push(Some(Relation {
            oid,
            schema: schema.into(),
            name: name.into(),
            kind: 'r',
            persistence: 'p',
            identity: 'd',
            is_partition: false,
            has_children: false,
        }));
        self.0.alike.push(None);
        self
    }

    /// A table whose only column is its key.
    fn table(self, oid: u32, schema: &str, name: &str) -> Self {
        let mut made = self.relation(oid, schema, name);
        made.0.columns.insert(oid, vec![attribute(1, "id", 20)]);
        made.0.indexes.insert(oid, vec![primary(&[1])]);
        made
    }

    fn with(mut self, change: impl FnOnce(&mut Relation)) -> Self {
        change(self.0.relations[0].as_mut().unwrap());
        self
    }

    fn column(mut self, attribute: Attribute) -> Self {
        self.0.columns.entry(100_000).or_default().push(attribute);
        self
    }

    fn index(mut self, index: IndexFacts) -> Self {
        self.0.indexes.entry(100_000).or_default().push(index);
        self
    }

    fn all(&self) -> Vec<Result<Table, Refusal>> {
        judge(&self.0).into_iter().map(Option::unwrap).collect()
    }

    fn judged(self) -> Result<Table, Refusal> {
        self.all().remove(0)
    }

    #[track_caller]
    fn refused(self, reason: &str) -> Option<String> {
        let refusal = self.judged().unwrap_err();
        assert!(refusal.reason.contains(reason), "{refusal}");
        refusal.remedy
    }
}

fn plain(name: &str) -> Type {
    Type {
        name: name.into(),
        extension: None,
        base: None,
        element: None,
        delimiter: ',',
        labels: None,
    }
}

fn locale(provider: char, locale: &str) -> Locale {
    Locale {
        provider,
        locale: Some(locale.into()),
        is_deterministic: true,
    }
}

fn attribute(attnum: i16, name: &str, type_oid: u32) -> Attribute {
    Attribute {
        attnum,
        name: name.into(),
        type_oid,
        typmod: -1,
        postgres_type: "?".into(),
        not_null: true,
        collation: 0,
        generated: false,
    }
}

fn unique(name: &str, key: &[i16]) -> IndexFacts {
    IndexFacts {
        name: name.into(),
        is_primary: false,
        is_identity: false,
        is_unique: true,
        is_immediate: true,
        is_valid: true,
        is_plain: true,
        is_btree: true,
        key: key.into(),
    }
}

fn primary(key: &[i16]) -> IndexFacts {
    IndexFacts {
        is_primary: true,
        ..unique("t_pkey", key)
    }
}

fn identity(key: &[i16]) -> IndexFacts {
    IndexFacts {
        is_identity: true,
        ..unique("t_identity", key)
    }
}

/// Columns a (dropped), b, c, d, of type int8.
fn three() -> Made {
    Made::new()
        .column(attribute(2, "b", 20))
        .column(attribute(3, "c", 20))
        .column(attribute(4, "d", 20))
}

#[test]
fn the_key_is_the_primary_key_in_the_order_of_its_index() {
    let table = three().index(primary(&[4, 2])).judged().unwrap();
    assert_eq!((table.key, table.identity), (vec![2, 0], Identity::Key));
}

#[test]
fn without_primary_key_the_key_is_the_identity() {
    let table = three()
        .with(|t| t.identity = 'i')
        .index(identity(&[4, 3]))
        .judged()
        .unwrap();
    assert_eq!((table.key, table.identity), (vec![2, 1], Identity::Key));
}

#[test]
fn the_identity_may_be_another_than_the_key() {
    let with = |index: IndexFacts| {
        let made = three().with(|t| t.identity = 'i').index(primary(&[2, 3]));
        let table = made.index(index).judged().unwrap();
        (table.key, table.identity)
    };
    assert_eq!(
        with(identity(&[4, 2])),
        (vec![0, 1], Identity::Index(vec![0, 2]))
    );
    // The same columns in another order.
    assert_eq!(with(identity(&[3, 2])), (vec![0, 1], Identity::Key));
    let full = three().with(|t| t.identity = 'f').index(primary(&[2]));
    assert_eq!(full.judged().unwrap().identity, Identity::Full);
}

/// Two rows of one key for a while: the mirror would lose one.
#[test]
fn a_deferrable_primary_key_is_never_the_key() {
    let deferrable = || IndexFacts {
        is_immediate: false,
        ..primary(&[2, 3])
    };
    for identity in ['d', 'f'] {
        let made = three().with(|t| t.identity = identity).index(deferrable());
        assert_eq!(
            made.refused("deferrable").unwrap(),
            "CREATE UNIQUE INDEX \"t_replica_identity\" ON \"public\".\"t\" (\"b\", \"c\"); \
             ALTER TABLE \"public\".\"t\" REPLICA IDENTITY USING INDEX \"t_replica_identity\""
        );
    }
    let made = three()
        .with(|t| t.identity = 'i')
        .index(deferrable())
        .index(identity(&[4]));
    let table = made.judged().unwrap();
    assert_eq!((table.key, table.identity), (vec![2], Identity::Key));
    // It is still an index.
    assert_eq!(table.indexes[0].columns, [0, 1]);
}

#[test]
fn tables_that_name_no_row_are_refused_with_what_mends_it() {
    let reason = "no primary key";
    assert_eq!(
        three().refused(reason).unwrap(),
        "ALTER TABLE \"public\".\"t\" ADD PRIMARY KEY (/* columns that together are unique */)"
    );
    three().with(|t| t.identity = 'f').refused(reason).unwrap();
    let using = "ALTER TABLE \"public\".\"t\" REPLICA IDENTITY USING INDEX \"u\"";
    assert_eq!(
        three().index(unique("u", &[2])).refused(reason).unwrap(),
        using
    );
    // None of these could be the identity.
    let nullable = Attribute {
        not_null: false,
        ..attribute(5, "e", 20)
    };
    let made = three().column(nullable).index(unique("n", &[5]));
    let made = made.index(IndexFacts {
        is_plain: false,
        ..unique("p", &[2])
    });
    let made = made.index(IndexFacts {
        is_immediate: false,
        ..unique("d", &[2])
    });
    let made = made.index(IndexFacts {
        is_valid: false,
        ..unique("v", &[2])
    });
    let made = made.index(IndexFacts {
        is_unique: false,
        ..unique("w", &[2])
    });
    assert!(made.refused(reason).unwrap().contains("ADD PRIMARY KEY"));
}

#[test]
fn identity_nothing_is_refused_although_there_is_a_key() {
    let made = three().with(|t| t.identity = 'n').index(primary(&[2]));
    assert_eq!(
        made.refused("NOTHING").unwrap(),
        "ALTER TABLE \"public\".\"t\" REPLICA IDENTITY DEFAULT"
    );
    let made = three().with(|t| t.identity = 'n').index(unique("u", &[2]));
    assert!(
        made.refused("NOTHING")
            .unwrap()
            .ends_with("USING INDEX \"u\"")
    );
}

#[test]
fn a_lost_or_nullable_identity_index_is_refused() {
    let made = three().with(|t| t.identity = 'i').index(primary(&[2]));
    assert!(
        made.refused("is gone")
            .unwrap()
            .ends_with("REPLICA IDENTITY DEFAULT")
    );
    three().with(|t| t.identity = 'i').refused("no primary key");
    let nullable = Attribute {
        not_null: false,
        ..attribute(5, "e\"", 20)
    };
    let made = three()
        .column(nullable)
        .with(|t| t.identity = 'i')
        .index(identity(&[2, 5]));
    assert_eq!(
        made.refused("may be NULL").unwrap(),
        "ALTER TABLE \"public\".\"t\" ALTER COLUMN \"e\"\"\" SET NOT NULL"
    );
}

#[test]
fn keys_that_sqlite_can_not_tell_apart_are_refused() {
    let mut made = Made::new();
    let domain = |base| Type {
        base: Some(base),
        ..plain("d")
    };
    let array = |element| Type {
        element: Some(element),
        ..plain("_d")
    };
    made.0.types.extend([
        (90_001, domain(701)),
        (90_002, domain(90_001)),
        (90_003, array(2205)),
    ]);
    let types = std::mem::take(&mut made.0.types);
    for (type_oid, reason) in [
        (701, "NaN"),
        (90_002, "NaN"),
        (2205, "another object"),
        (90_003, "another object"),
    ] {
        let mut made = Made::new()
            .column(attribute(1, "k", type_oid))
            .index(primary(&[1]));
        made.0.types = types.clone();
        assert_eq!(made.refused(reason), None);
    }
    let generated = Attribute {
        generated: true,
        ..attribute(1, "k", 20)
    };
    Made::new()
        .column(generated)
        .index(primary(&[1]))
        .refused("\"k\" of its key is generated");
}

#[test]
fn what_is_no_plain_table_is_refused() {
    for (kind, reason) in [
        ('p', "partitioned"),
        ('v', "a view"),
        ('m', "materialized"),
        ('f', "foreign"),
        ('S', "a sequence"),
        ('i', "not a table"),
    ] {
        assert_eq!(three().with(|t| t.kind = kind).refused(reason), None);
    }
    three()
        .with(|t| t.is_partition = true)
        .refused("a partition");
    three().with(|t| t.has_children = true).refused("inherit");
    three().with(|t| t.persistence = 't').refused("temporary");
    let remedy = three().with(|t| t.persistence = 'u').refused("unlogged");
    assert_eq!(remedy.unwrap(), "ALTER TABLE \"public\".\"t\" SET LOGGED");
    three().with(|t| t.oid = 1259).refused("system catalog");
    for schema in ["pg_catalog", "information_schema", "pg_toast"] {
        three()
            .with(|t| t.schema = schema.into())
            .refused("system catalog");
    }
    three()
        .with(|t| t.schema = "anabranch".into())
        .refused("streamer's own");
}

#[test]
fn reserved_names_are_refused_in_any_case() {
    for (schema, name) in [
        ("public", "_anabranch_status"),
        ("public", "_Anabranch_x"),
        ("public", "SQLite_x"),
        ("sqlite_", "x"),
        ("_anabranch_", "x"),
    ] {
        let named = |t: &mut Relation| (t.schema, t.name) = (schema.into(), name.into());
        three().with(named).refused("reserved");
    }
    // In another schema they do not begin the name in SQLite.
    let elsewhere = |t: &mut Relation| (t.schema, t.name) = ("s".into(), "sqlite_x".into());
    assert!(
        three()
            .with(elsewhere)
            .index(primary(&[2]))
            .judged()
            .is_ok()
    );
}

#[test]
fn names_that_differ_only_by_case_are_refused() {
    three()
        .column(attribute(9, "B", 20))
        .index(primary(&[2]))
        .refused("\"b\" and \"B\"");
    // SQLite ignores the case of ASCII only.
    let umlauts = three()
        .column(attribute(8, "ä", 20))
        .column(attribute(9, "Ä", 20));
    assert!(umlauts.index(primary(&[2])).judged().is_ok());
    // What is not replicated does not collide.
    let generated = Attribute {
        generated: true,
        ..attribute(9, "B", 20)
    };
    let table = three()
        .column(generated)
        .index(primary(&[2]))
        .judged()
        .unwrap();
    assert_eq!(table.columns.len(), 3);
}

#[test]
fn tables_that_would_be_one_in_sqlite_are_refused_both() {
    let reasons = |tables: &[(u32, &str, &str)]| -> Vec<Option<String>> {
        let made = tables
            .iter()
            .fold(Made(Facts::default()), |made, (oid, schema, name)| {
                made.table(*oid, schema, name)
            });
        made.all()
            .into_iter()
            .map(|judged| judged.err().map(|refusal| refusal.to_string()))
            .collect()
    };
    let refused = reasons(&[
        (1 << 20, "public", "t"),
        (2 << 20, "public", "T"),
        (3 << 20, "public", "u"),
    ]);
    assert!(
        refused[0]
            .as_ref()
            .unwrap()
            .starts_with("table public.t: it and public.T would")
    );
    assert!(
        refused[1]
            .as_ref()
            .unwrap()
            .starts_with("table public.T: it and public.t would")
    );
    assert_eq!(refused[2], None);
    let refused = reasons(&[(1 << 20, "s", "T"), (2 << 20, "public", "s.t")]);
    assert!(refused.iter().all(Option::is_some));
    // One table that was asked for twice is one table.
    assert_eq!(
        reasons(&[
            (1 << 20, "s", "t"),
            (1 << 20, "s", "t"),
            (2 << 20, "public", "t")
        ]),
        [None, None, None]
    );
}

#[test]
fn more_columns_than_sqlite_takes_are_refused() {
    let many = |count: i16| {
        let made = Made::new().index(primary(&[1]));
        (1..=count).fold(made, |made, n| {
            made.column(attribute(n, &format!("c{n}"), 20))
        })
    };
    assert!(many(2000).judged().is_ok());
    many(2001).refused("2001 columns");
}

#[test]
fn kinds_are_resolved_through_domains_and_arrays() {
    let mut facts = Made::new().0;
    let citext = |extension: Option<&str>| Type {
        extension: extension.map(Into::into),
        ..plain("citext")
    };
    let over = |base: Option<u32>, element: Option<u32>| Type {
        base,
        element,
        ..plain("x")
    };
    let mood = Type {
        labels: Some(vec!["sad".into(), "ok".into()]),
        ..plain("mood")
    };
    facts.types.extend([
        (1, over(Some(20), None)),
        (2, over(Some(1), None)),
        (3, over(None, Some(2))),
        (4, over(Some(3), None)),
        (5, over(None, Some(603))),
        (6, mood),
        (7, over(None, Some(6))),
        (8, citext(Some("citext"))),
        (9, citext(None)),
        (10, citext(Some("other"))),
    ]);
    let array = |kind, delimiter| Kind::Array(Box::new(kind), delimiter);
    let mood = Kind::Enum(vec!["sad".into(), "ok".into()]);
    for (oid, expect) in [
        (2, Kind::Integer),
        (3, array(Kind::Integer, ',')),
        (4, array(Kind::Integer, ',')),
        (5, array(Kind::Other, ';')),
        (7, array(mood.clone(), ',')),
        (6, mood),
        (8, Kind::Citext),
        // Somebody's own type of that name is another type.
        (9, Kind::Other),
        (10, Kind::Other),
        (999, Kind::Other),
    ] {
        assert_eq!(kind(&facts, oid), expect, "{oid}");
    }
}

#[test]
fn collations_are_resolved() {
    use Collation::{Bytes, Deterministic, NonDeterministic};
    for (provider, name, expect) in [
        ('c', "C", Bytes),
        ('c', "POSIX", Bytes),
        ('c', "C.UTF-8", Bytes),
        ('c', "C.utf8", Bytes),
        ('c', "en_US.utf8", Deterministic),
        ('c', "", Deterministic),
        ('b', "C", Bytes),
        ('b', "C.UTF-8", Bytes),
        ('b', "PG_UNICODE_FAST", Bytes),
        ('b', "SOMETHING_NEWER", Deterministic),
        ('i', "C", Deterministic),
        ('i', "en-US", Deterministic),
        ('?', "C", Deterministic),
    ] {
        assert_eq!(
            collation(&locale(provider, name)),
            expect,
            "{provider} {name}"
        );
    }
    let loose = Locale {
        is_deterministic: false,
        ..locale('i', "und")
    };
    assert_eq!(collation(&loose), NonDeterministic);

    let mut made = Made::new().index(primary(&[1]));
    made.0.collations.extend([
        (100, locale('d', "")),
        (950, locale('c', "C")),
        (951, loose),
    ]);
    made.0.types.insert(
        8,
        Type {
            extension: Some("citext".into()),
            ..plain("citext")
        },
    );
    for (attnum, type_oid, collation) in [
        (1, 20, 0),
        (2, 25, 100),
        (3, 25, 950),
        (4, 25, 951),
        (5, 8, 100),
        (6, 25, 7),
    ] {
        made = made.column(Attribute {
            collation,
            ..attribute(attnum, &format!("c{attnum}"), type_oid)
        });
    }
    let of = |made: Made| -> Vec<_> {
        made.judged()
            .unwrap()
            .columns
            .into_iter()
            .map(|column| column.collation)
            .collect()
    };
    let expect = [
        Bytes,
        Deterministic,
        Bytes,
        NonDeterministic,
        NonDeterministic,
        NonDeterministic,
    ];
    made.0.database = locale('c', "de_DE.utf8");
    assert_eq!(of(made), expect);
}

#[test]
fn only_whole_indexes_on_columns_become_secondary() {
    let made = three().index(primary(&[2]));
    let index = |name: &str, key: &[i16]| IndexFacts {
        is_unique: false,
        ..unique(name, key)
    };
    let made = made
        .index(index("two", &[3, 2]))
        .index(unique("unique", &[3]))
        .index(index("again", &[3]))
        .index(index("key_again", &[2]))
        .index(index("of_a_column_left_out", &[1]))
        .index(index("sqlite_x", &[4]))
        .index(IndexFacts {
            is_plain: false,
            ..index("partial", &[4])
        })
        .index(IndexFacts {
            is_valid: false,
            ..index("invalid", &[4])
        })
        .index(IndexFacts {
            is_btree: false,
            ..index("hash", &[4])
        });
    let indexes = made.judged().unwrap().indexes;
    let indexes: Vec<_> = indexes
        .iter()
        .map(|index| (index.name.as_str(), &index.columns[..]))
        .collect();
    assert_eq!(indexes, [("two", &[1, 0][..]), ("unique", &[1][..])]);
}

#[test]
fn a_missing_table_is_told_from_one_in_another_case() {
    let name = Name {
        schema: "public".into(),
        name: "issues".into(),
    };
    assert_eq!(
        missing(&name, None).to_string(),
        "table public.issues: it does not exist"
    );
    let hint = missing(&name, Some("public.\"Issues\"")).reason;
    assert_eq!(
        hint,
        "it does not exist; is public.\"Issues\" meant? Case matters"
    );
}
