"""Checks what the programs are made of: licences, sources, and that there is one of each where two do harm.

Reads `cargo tree`: the packages that are really compiled for this platform, for tests and builds too. (`cargo metadata`
also names those that only a feature would add that is off.)
"""

import re
import subprocess
import sys

# Licences that ask for no more than their text and a notice.
ALLOWED = {
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Zlib",
}

# Packages that must not be there, and why.
BANNED = {
    "ring": "a second TLS provider: rustls panics when it finds two",
    "openssl-sys": "TLS is rustls; nothing may need a system library",
    "native-tls": "TLS is rustls; nothing may need a system library",
    "rsa": "RUSTSEC-2023-0071 has no fix",
}

# Packages of which there must be one version only: types of two don't fit, or they link the same C code.
SINGLE = [
    "aws-lc-rs",
    "axum",
    "bytes",
    "hyper",
    "libsqlite3-sys",
    "postgres-protocol",
    "prost",
    "rusqlite",
    "rustls",
    "tokio",
    "tokio-postgres",
    "tokio-rustls",
    "tonic",
]


def allowed(expression: str) -> bool:
    """Whether an SPDX expression can be met by allowed licences alone."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def either() -> bool:
        value = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = both() or value
        return value

    def both() -> bool:
        value = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = one() and value
        return value

    def one() -> bool:
        token = tokens.pop(0)
        if token == "(":
            value = either()
            tokens.pop(0)
            return value
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token += " WITH " + tokens.pop(0)
        return token in ALLOWED

    return either()


def main() -> int:
    tree = ["cargo", "tree", "--workspace", "--locked", "--edges=normal,build,dev", "--prefix=none"]
    lines = subprocess.check_output([*tree, "--format={p}|{l}"], text=True).splitlines()
    # `name vVERSION (proc-macro) (path or git address)`, and a mark where a package was listed before.
    packages = {tuple(line.removesuffix(" (*)").split("|")) for line in lines if line}

    problems = []
    versions: dict[str, set[str]] = {}
    for package, licence in packages:
        name, version, *rest = package.replace("(proc-macro)", "").split()
        versions.setdefault(name, set()).add(version)
        if name in BANNED:
            problems.append(f"{package}: {BANNED[name]} (cargo tree -i {name})")
        if rest and not name.startswith("anabranch-"):
            problems.append(f"{package}: is not from a registry")
        if not licence:
            problems.append(f"{package}: names no licence")
        elif not allowed(licence):
            problems.append(f"{package}: licence {licence}")
    for name in SINGLE:
        if len(versions.get(name, ())) > 1:
            problems.append(f"{name}: several versions, {', '.join(sorted(versions[name]))}")
        elif name not in versions:
            problems.append(f"{name}: is not there; is it still right to look for it?")

    for problem in sorted(problems):
        print(problem, file=sys.stderr)
    several = sorted(name for name, found in versions.items() if len(found) > 1)
    print(f"{len(packages)} packages; in several versions, harmlessly: {', '.join(several) or 'none'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
