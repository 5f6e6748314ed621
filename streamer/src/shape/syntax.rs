//! A SELECT as it is written, before anything is known of the table: names, constants and operators with their
//! places. No types yet; [`super::typing`] gives them.

/// A place in the SQL: line and column, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Line, from 1.
    pub line: u64,
    /// Column in characters, from 1.
    pub column: u64,
}

/// Something is refused, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub place: Place,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl Place {
    /// The first character.
    pub const START: Place = Place { line: 1, column: 1 };

    /// A fault here.
    pub fn fault(self, reason: impl Into<String>) -> Fault {
        Fault {
            place: self,
            reason: reason.into(),
        }
    }
}

/// A name, with the case folded as Postgres does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// Its text.
    pub text: String,
    /// Where it is.
    pub place: Place,
}

/// `SELECT columns FROM [schema.]table [alias] [WHERE condition]`.
#[derive(Clone, Debug)]
pub struct Statement {
    /// Schema; `public` where none is written.
    pub schema: String,
    /// Table.
    pub table: Name,
    /// Another name for the table, which then is the only one.
    pub alias: Option<String>,
    /// The list of columns.
    pub columns: Columns,
    /// The condition.
    pub condition: Option<Expression>,
}

/// The list of columns.
#[derive(Clone, Debug)]
pub enum Columns {
    /// `*` or `t.*`; the qualifier's parts.
    All(Vec<Name>),
    /// Columns, each with its qualifiers: the last part is the column.
    Named(Vec<Vec<Name>>),
    /// What EXISTS does not look at: columns, tables before `.*`, and constants, which are not kept.
    Ignored {
        /// Columns, as in [`Columns::Named`].
        named: Vec<Vec<Name>>,
        /// Qualifiers, as in [`Columns::All`].
        all: Vec<Vec<Name>>,
    },
}

/// An expression and the place where it begins.
#[derive(Clone, Debug)]
pub struct Expression {
    /// Where it begins.
    pub place: Place,
    /// What it is.
    pub node: Node,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `<>`, `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

/// What `IS` asks of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// `IS TRUE`
    True,
    /// `IS FALSE`
    False,
    /// `IS UNKNOWN`
    Unknown,
}

/// What an expression is.
#[derive(Clone, Debug)]
pub enum Node {
    /// `[schema.][table.]column`
    Column(Vec<Name>),
    /// `'…'`
    Text(String),
    /// `1`, `-2.5`, `1e3`: with its sign.
    Number(String),
    /// `TRUE`, `FALSE`
    Boolean(bool),
    /// `NULL`
    Null,
    /// `$name`
    Param(String),
    /// `CAST(x AS type)`, `x::type`, `type '…'`
    Cast(Box<Expression>, TypeName),
    /// `-x`, where `x` is not a plain number.
    Negate(Box<Expression>),
    /// `ARRAY[…]`
    Array(Vec<Expression>),
    /// `(a, b)`
    Row(Vec<Expression>),
    /// `a = b` and the like.
    Compare(Comparison, Box<Expression>, Box<Expression>),
    /// `a = ANY (b)`, `a = ALL (b)`
    Quantified {
        /// The comparison.
        comparison: Comparison,
        /// `ALL`, not `ANY`.
        all: bool,
        /// Left of it.
        left: Box<Expression>,
        /// The array.
        array: Box<Expression>,
    },
    /// `a [NOT] IN (…)`
    In {
        /// `NOT`.
        negated: bool,
        /// Left of it.
        left: Box<Expression>,
        /// The list.
        list: Vec<Expression>,
    },
    /// `a [NOT] IN (SELECT …)`, `a = ANY (SELECT …)`, `a <> ALL (SELECT …)`
    InSelect {
        /// `NOT`.
        negated: bool,
        /// Left of it: one for each column.
        left: Vec<Expression>,
        /// The subquery.
        select: Box<Statement>,
    },
    /// `EXISTS (SELECT …)`
    Exists(Box<Statement>),
    /// `a [NOT] BETWEEN [SYMMETRIC] b AND c`
    Between {
        /// `NOT`.
        negated: bool,
        /// `SYMMETRIC`.
        symmetric: bool,
        /// Left of it.
        left: Box<Expression>,
        /// One end.
        low: Box<Expression>,
        /// The other.
        high: Box<Expression>,
    },
    /// `a [NOT] LIKE b [ESCAPE c]`
    Like {
        /// `NOT`.
        negated: bool,
        /// Left of it.
        left: Box<Expression>,
        /// The pattern.
        pattern: Box<Expression>,
        /// The escape character, if one is named: empty for none.
        escape: Option<String>,
    },
    /// `a IS [NOT] NULL`
    IsNull {
        /// `NOT`.
        negated: bool,
        /// Left of it.
        left: Box<Expression>,
    },
    /// `a IS [NOT] TRUE` and the like.
    IsTruth {
        /// `NOT`.
        negated: bool,
        /// What is asked.
        truth: Truth,
        /// Left of it.
        left: Box<Expression>,
    },
    /// `a IS [NOT] DISTINCT FROM b`
    Distinct {
        /// `NOT`.
        negated: bool,
        /// Left of it.
        left: Box<Expression>,
        /// Right of it.
        right: Box<Expression>,
    },
    /// `a AND b AND …`
    And(Vec<Expression>),
    /// `a OR b OR …`
    Or(Vec<Expression>),
    /// `NOT a`
    Not(Box<Expression>),
}

impl Node {
    /// Whether it is a value, not a condition made of others.
    pub fn is_operand(&self) -> bool {
        matches!(
            self,
            Node::Column(_)
                | Node::Text(_)
                | Node::Number(_)
                | Node::Boolean(_)
                | Node::Null
                | Node::Param(_)
                | Node::Cast(..)
                | Node::Negate(_)
                | Node::Array(_)
                | Node::Row(_)
        )
    }
}

impl Statement {
    /// This SELECT, and the subqueries of its condition.
    pub fn all(&self) -> Vec<&Statement> {
        let mut found = vec![self];
        for subquery in self.subqueries() {
            found.extend(subquery.all());
        }
        found
    }

    /// A subquery that is nested deeper than so many levels.
    pub fn deeper_than(&self, levels: usize) -> Option<&Statement> {
        let mut subqueries = self.subqueries().into_iter();
        match levels.checked_sub(1) {
            None => subqueries.next(),
            Some(levels) => subqueries.find_map(|subquery| subquery.deeper_than(levels)),
        }
    }

    /// Those of its condition, not those in them.
    fn subqueries(&self) -> Vec<&Statement> {
        let mut found = Vec::new();
        if let Some(condition) = &self.condition {
            condition.subqueries(&mut found);
        }
        found
    }
}

impl Expression {
    /// The parts that AND joins, in parentheses or not.
    pub fn conjuncts<'a>(&'a self, parts: &mut Vec<&'a Expression>) {
        match &self.node {
            Node::And(of) => of.iter().for_each(|part| part.conjuncts(parts)),
            _ => parts.push(self),
        }
    }

    fn subqueries<'a>(&'a self, found: &mut Vec<&'a Statement>) {
        match &self.node {
            Node::InSelect { select, .. } | Node::Exists(select) => found.push(select),
            Node::And(parts) | Node::Or(parts) => {
                parts.iter().for_each(|part| part.subqueries(found));
            }
            Node::Not(inner)
            | Node::IsTruth { left: inner, .. }
            | Node::IsNull { left: inner, .. } => inner.subqueries(found),
            // Made of operands; a condition among them is refused when they get their types.
            _ => {}
        }
    }
}

/// The name of a type, as Postgres' grammar resolves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeName {
    /// Its schema, if one is written.
    pub schema: Option<String>,
    /// Its name: of a built-in type the internal one, such as `int4` or `bpchar`.
    pub name: String,
    /// The length of `varchar(n)` and `char(n)`.
    pub length: Option<usize>,
    /// `type[]`
    pub array: bool,
}

impl Comparison {
    /// Whether it asks for more than equality.
    pub fn needs_order(self) -> bool {
        !matches!(self, Comparison::Equal | Comparison::NotEqual)
    }

    /// The one that says the same with its sides exchanged.
    pub fn turned(self) -> Comparison {
        match self {
            Comparison::Equal | Comparison::NotEqual => self,
            Comparison::Less => Comparison::Greater,
            Comparison::LessOrEqual => Comparison::GreaterOrEqual,
            Comparison::Greater => Comparison::Less,
            Comparison::GreaterOrEqual => Comparison::LessOrEqual,
        }
    }

    /// As Postgres writes it.
    pub fn sql(self) -> &'static str {
        match self {
            Comparison::Equal => "=",
            Comparison::NotEqual => "<>",
            Comparison::Less => "<",
            Comparison::LessOrEqual => "<=",
            Comparison::Greater => ">",
            Comparison::GreaterOrEqual => ">=",
        }
    }
}
