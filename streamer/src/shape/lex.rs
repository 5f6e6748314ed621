//! The tokens of a SELECT: sqlparser's tokenizer cuts them, an allow-list lets them in.
//!
//! What no condition can use is refused here already, by name and exact place: other operators, other kinds of
//! strings, the keywords of clauses and functions that are not supported.
//!
//! Source of the keywords: <https://www.postgresql.org/docs/15/sql-keywords-appendix.html>, and `pg_get_keywords()`.

use sqlparser::{
    dialect::PostgreSqlDialect,
    tokenizer::{Location, Token as Raw, TokenWithSpan, Tokenizer, Whitespace},
};

use super::syntax::{Comparison, Fault, Place};

/// Longest SQL of one SELECT.
pub const SQL_BYTES_MAX: usize = 64 * 1024;

/// One token and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// What it is.
    pub kind: Kind,
    /// Where it begins.
    pub place: Place,
}

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// An unquoted word, in lower case as Postgres folds it: a keyword or a name.
    Word(String),
    /// A quoted name.
    Quoted(String),
    /// A number without sign.
    Number(String),
    /// `'…'`
    Text(String),
    /// `$name`, without the `$`.
    Param(String),
    /// A comparison.
    Comparison(Comparison),
    /// `(`
    Open,
    /// `)`
    Close,
    /// `[`
    OpenBracket,
    /// `]`
    CloseBracket,
    /// `,`
    Comma,
    /// `.`
    Period,
    /// `*`
    Star,
    /// `-`
    Minus,
    /// `+`
    Plus,
    /// `::`
    DoubleColon,
    /// The end of the SQL.
    End,
}

/// The words that mean something in a SELECT that is supported.
const KEYWORDS: [&str; 21] = [
    "all",
    "and",
    "any",
    "array",
    "as",
    "asymmetric",
    "cast",
    "distinct",
    "false",
    "from",
    "in",
    "is",
    "isnull",
    "like",
    "not",
    "notnull",
    "null",
    "or",
    "some",
    "symmetric",
    "true",
];

/// Postgres' reserved words that are not supported: unquoted, no column can have such a name.
const REFUSED: [&str; 79] = [
    "analyse",
    "analyze",
    "asc",
    "authorization",
    "binary",
    "both",
    "case",
    "check",
    "collate",
    "collation",
    "column",
    "concurrently",
    "constraint",
    "create",
    "cross",
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "default",
    "deferrable",
    "desc",
    "do",
    "else",
    "end",
    "except",
    "fetch",
    "for",
    "foreign",
    "freeze",
    "full",
    "grant",
    "group",
    "having",
    "ilike",
    "initially",
    "inner",
    "intersect",
    "into",
    "join",
    "lateral",
    "leading",
    "left",
    "limit",
    "localtime",
    "localtimestamp",
    "natural",
    "offset",
    "on",
    "only",
    "order",
    "outer",
    "overlaps",
    "placing",
    "primary",
    "references",
    "returning",
    "right",
    "session_user",
    "similar",
    "table",
    "tablesample",
    "then",
    "to",
    "trailing",
    "union",
    "unique",
    "user",
    "using",
    "variadic",
    "verbose",
    "when",
    "window",
    "with",
    "select",
    "where",
];

/// Why a reserved word is refused.
fn refusal(word: &str) -> String {
    let upper = word.to_ascii_uppercase();
    match word {
        "select" => "SELECT can stand only at the beginning, and in the parentheses of IN, = ANY, <> ALL and EXISTS".to_owned(),
        "with" => "WITH (common table expressions) is not supported".to_owned(),
        "join" | "cross" | "inner" | "left" | "right" | "full" | "outer" | "natural" | "on"
        | "using" | "lateral" => {
            format!("joins are not supported: a shape has one SELECT for each table, with subqueries for what depends on others ({upper})")
        }
        "order" | "limit" | "offset" | "fetch" | "group" | "having" | "window" | "union"
        | "intersect" | "except" | "for" | "into" | "tablesample" | "only" => {
            format!("{upper} is not supported: a shape is all rows for which a condition holds")
        }
        "current_date" | "current_time" | "current_timestamp" | "localtime" | "localtimestamp" => {
            format!("{upper} is not supported: when time passes, no event tells it")
        }
        "current_user" | "current_role" | "session_user" | "user" | "current_catalog"
        | "current_schema" => {
            format!("{upper} is not supported: bind a parameter to a claim of the token instead")
        }
        "ilike" | "similar" => {
            format!("{upper} is not supported: it depends on the locale; use LIKE")
        }
        "collate" => "COLLATE is not supported: text compares by its column's collation".to_owned(),
        "case" => "CASE is not supported: use AND, OR and NOT".to_owned(),
        "default" => "DEFAULT is not supported".to_owned(),
        _ => format!(
            "{upper} is a reserved word and not supported here; a name like this must be in double quotes"
        ),
    }
}

/// Cuts `sql` in tokens. The last one is [`Kind::End`].
pub fn tokens(sql: &str) -> Result<Vec<Token>, Fault> {
    if sql.len() > SQL_BYTES_MAX {
        return Err(Place::START.fault(format!("the SQL is longer than {SQL_BYTES_MAX} bytes")));
    }
    if sql.contains('\0') {
        return Err(Place::START.fault("the SQL contains a NUL character"));
    }
    let raw = Tokenizer::new(&PostgreSqlDialect {}, sql)
        .tokenize_with_location()
        .map_err(|error| place(error.location).fault(error.message))?;
    refuse_foreign_blanks(sql, &raw)?;
    let mut tokens = Vec::new();
    let mut after_number = false;
    let mut raw = raw.into_iter().peekable();
    while let Some(TokenWithSpan { token, span }) = raw.next() {
        let place = place(span.start);
        let is_number = matches!(token, Raw::Number(..));
        if after_number && matches!(token, Raw::Word(_)) {
            return Err(place.fault("a number must be followed by a blank"));
        }
        after_number = is_number;
        let kind = match token {
            Raw::Whitespace(_) | Raw::EOF => continue,
            // Only at the end, as psql wants it.
            Raw::SemiColon
                if raw
                    .clone()
                    .all(|t| matches!(t.token, Raw::Whitespace(_) | Raw::EOF)) =>
            {
                continue;
            }
            Raw::SemiColon => {
                return Err(place.fault("one SELECT only: there is more after the `;`"));
            }
            Raw::Word(word) if word.quote_style == Some('"') => Kind::Quoted(word.value),
            Raw::Word(word) if word.quote_style.is_none() => {
                let word = word.value.to_ascii_lowercase();
                let is_first = tokens.is_empty();
                let is_opened = matches!(
                    tokens.last(),
                    Some(Token {
                        kind: Kind::Open,
                        ..
                    })
                );
                // These have their places, which the parser knows; WITH that of `timestamp with time zone`.
                let has_place = match word.as_str() {
                    "select" => is_first || is_opened,
                    "with" => !is_first,
                    "where" => true,
                    _ => false,
                };
                if !has_place && REFUSED.contains(&word.as_str()) {
                    return Err(place.fault(refusal(&word)));
                }
                Kind::Word(word)
            }
            Raw::Number(number, false) => Kind::Number(number),
            Raw::SingleQuotedString(text) => Kind::Text(text),
            Raw::Placeholder(name) => Kind::Param(param(&name, place)?),
            Raw::Eq => Kind::Comparison(Comparison::Equal),
            Raw::Neq => Kind::Comparison(Comparison::NotEqual),
            Raw::Lt => Kind::Comparison(Comparison::Less),
            Raw::LtEq => Kind::Comparison(Comparison::LessOrEqual),
            Raw::Gt => Kind::Comparison(Comparison::Greater),
            Raw::GtEq => Kind::Comparison(Comparison::GreaterOrEqual),
            Raw::LParen => Kind::Open,
            Raw::RParen => Kind::Close,
            Raw::LBracket => Kind::OpenBracket,
            Raw::RBracket => Kind::CloseBracket,
            Raw::Comma => Kind::Comma,
            Raw::Period => Kind::Period,
            Raw::Mul => Kind::Star,
            Raw::Minus => Kind::Minus,
            Raw::Plus => Kind::Plus,
            Raw::DoubleColon => Kind::DoubleColon,
            other => return Err(place.fault(not_allowed(&other))),
        };
        tokens.push(Token { kind, place });
    }
    let end = tokens.last().map_or(Place::START, |last| last.place);
    tokens.push(Token {
        kind: Kind::End,
        place: end,
    });
    Ok(tokens)
}

fn place(location: Location) -> Place {
    Place {
        line: location.line.max(1),
        column: location.column.max(1),
    }
}

fn param(placeholder: &str, place: Place) -> Result<String, Fault> {
    let name = placeholder.strip_prefix('$').unwrap_or_default();
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if starts_well && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        Ok(name.to_owned())
    } else {
        Err(place.fault("a parameter is $ and a name of letters, digits and _"))
    }
}

fn not_allowed(token: &Raw) -> String {
    match token {
        Raw::EscapedStringLiteral(_)
        | Raw::UnicodeStringLiteral(_)
        | Raw::NationalStringLiteral(_)
        | Raw::DollarQuotedString(_) => {
            "write strings as '…': this kind is not supported".to_owned()
        }
        Raw::SingleQuotedByteStringLiteral(_)
        | Raw::HexStringLiteral(_)
        | Raw::DoubleQuotedByteStringLiteral(_) => {
            "bit strings and hexadecimal numbers are not supported".to_owned()
        }
        Raw::Tilde
        | Raw::TildeAsterisk
        | Raw::ExclamationMarkTilde
        | Raw::ExclamationMarkTildeAsterisk => {
            format!("regular expressions (`{token}`) are not supported; use LIKE")
        }
        Raw::DoubleTilde | Raw::ExclamationMarkDoubleTilde => {
            format!("write LIKE or NOT LIKE instead of `{token}`")
        }
        Raw::Div | Raw::Mod | Raw::Caret => format!("arithmetic (`{token}`) is not supported"),
        Raw::Number(..) => "this is not a number of Postgres".to_owned(),
        _ => format!("`{token}` is not supported"),
    }
}

/// sqlparser takes every blank of Unicode as one; to Postgres most are letters, and the two must read the same.
fn refuse_foreign_blanks(sql: &str, tokens: &[TokenWithSpan]) -> Result<(), Fault> {
    let foreign = |c: &char| c.is_whitespace() && !matches!(c, ' ' | '\t' | '\n' | '\r');
    let count = |text: &str| text.chars().filter(foreign).count();
    let all = count(sql);
    if all == 0 {
        return Ok(());
    }
    let quoted: usize = tokens
        .iter()
        .map(|token| match &token.token {
            Raw::SingleQuotedString(text) => count(text),
            Raw::Word(word) => count(&word.value),
            Raw::Whitespace(
                Whitespace::SingleLineComment { comment, .. }
                | Whitespace::MultiLineComment(comment),
            ) => count(comment),
            _ => 0,
        })
        .sum();
    if quoted == all {
        return Ok(());
    }
    Err(Place::START.fault(
        "outside of strings, blanks must be plain ones (a no-break space or the like is here)",
    ))
}

impl Kind {
    /// Whether it is a word that Postgres takes as a name without quotes.
    pub fn is_free_name(&self) -> bool {
        matches!(self, Kind::Word(word)
            if !KEYWORDS.contains(&word.as_str()) && !REFUSED.contains(&word.as_str()))
    }

    /// For errors.
    pub fn describe(&self) -> String {
        match self {
            Kind::Word(word) => format!("`{word}`"),
            Kind::Quoted(name) => format!("`\"{name}\"`"),
            Kind::Number(_) => "a number".to_owned(),
            Kind::Text(_) => "a string".to_owned(),
            Kind::Param(name) => format!("`${name}`"),
            Kind::Comparison(comparison) => format!("`{}`", comparison.sql()),
            Kind::Open => "`(`".to_owned(),
            Kind::Close => "`)`".to_owned(),
            Kind::OpenBracket => "`[`".to_owned(),
            Kind::CloseBracket => "`]`".to_owned(),
            Kind::Comma => "`,`".to_owned(),
            Kind::Period => "`.`".to_owned(),
            Kind::Star => "`*`".to_owned(),
            Kind::Minus => "`-`".to_owned(),
            Kind::Plus => "`+`".to_owned(),
            Kind::DoubleColon => "`::`".to_owned(),
            Kind::End => "the end".to_owned(),
        }
    }
}
