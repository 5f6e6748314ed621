//! Tokens become a [`Statement`]: a grammar of its own that is a part of Postgres'.
//!
//! sqlparser cuts the tokens (see [`super::lex`]), but its syntax tree is not used: it accepts what Postgres refuses
//! (`==`, `a = b = c`), has no `BETWEEN SYMMETRIC`, and knows the places of few of its parts. What is
//! read here is read as Postgres reads it, and whatever the grammar does not know is refused, with its place.
//!
//! Precedence, loosest first, as in `gram.y` of Postgres: OR, AND, NOT, IS, comparison (not associative),
//! BETWEEN IN LIKE (not associative), unary minus, `::`.

use super::{
    cursor::Cursor,
    lex::Kind,
    syntax::{Columns, Comparison, Expression, Fault, Name, Node, Place, Statement, Truth},
};

/// Most tests (`IS …`) or casts (`::…`) in a row: each is a level, too.
const CHAIN_MAX: usize = 4;

/// Reads one SELECT.
pub fn statement(sql: &str) -> Result<Statement, Fault> {
    Cursor::new(sql)?.statement(Role::Shape)
}

/// What a SELECT is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The rows of a shape.
    Shape,
    /// The values that IN compares with.
    In,
    /// Whether there is a row.
    Exists,
}

/// A part of what EXISTS selects.
enum Selected {
    All(Vec<Name>),
    Column(Vec<Name>),
}

impl Cursor {
    fn statement(&mut self, role: Role) -> Result<Statement, Fault> {
        if !self.take_word("select") {
            return Err(self.unexpected("SELECT"));
        }
        if self.is_word(0, "distinct") {
            return Err(self.place().fault(match role {
                Role::Shape => "DISTINCT is not supported: rows have keys, none is there twice",
                Role::In | Role::Exists => {
                    "DISTINCT is not supported: here it would change nothing"
                }
            }));
        }
        self.take_word("all");
        let columns = match role {
            Role::Shape | Role::In => self.columns()?,
            Role::Exists => self.ignored_columns()?,
        };
        self.expect_word("from")?;
        if *self.peek() == Kind::Open {
            return Err(self
                .place()
                .fault("subqueries in FROM are not supported: name a table"));
        }
        let mut name = self.dotted_name("the name of a table")?;
        if *self.peek() == Kind::Open {
            return Err(self
                .place()
                .fault("functions are not supported: name a table"));
        }
        if *self.peek() == Kind::Star {
            return Err(self
                .place()
                .fault("`*` after the name of a table is not supported"));
        }
        let table = name.pop().expect("a dotted name has a part");
        let schema = match name.len() {
            0 => "public".to_owned(),
            1 => name.remove(0).text,
            _ => return Err(table.place.fault("a table is named table or schema.table")),
        };
        let has_as = self.take_word("as");
        let alias = if has_as || self.is_name() {
            Some(self.name("another name for the table")?.text)
        } else {
            None
        };
        if *self.peek() == Kind::Open {
            return Err(self.place().fault("renaming columns is not supported"));
        }
        if *self.peek() == Kind::Comma {
            return Err(self
                .place()
                .fault("joins are not supported: a shape has one SELECT for each table, with subqueries for what depends on others"));
        }
        let condition = if self.take_word("where") {
            Some(self.expression()?)
        } else {
            None
        };
        let is_over = match role {
            Role::Shape => *self.peek() == Kind::End,
            Role::In | Role::Exists => *self.peek() == Kind::Close,
        };
        if !is_over {
            let more = if condition.is_some() {
                "AND, OR"
            } else {
                "WHERE"
            };
            let end = if role == Role::Shape {
                "the end"
            } else {
                "`)`"
            };
            return Err(self.unexpected(&format!("{more} or {end}")));
        }
        Ok(Statement {
            schema,
            table,
            alias,
            columns,
            condition,
        })
    }

    fn columns(&mut self) -> Result<Columns, Fault> {
        let mut named = Vec::new();
        loop {
            match self.selected()? {
                Selected::All(_) if !named.is_empty() || *self.peek() == Kind::Comma => {
                    return Err(self.place().fault("choose either * or columns"));
                }
                Selected::All(parts) => return Ok(Columns::All(parts)),
                Selected::Column(parts) => named.push(parts),
            }
            if !self.take(&Kind::Comma) {
                return Ok(Columns::Named(named));
            }
        }
    }

    /// What EXISTS selects: nothing, or columns, stars and constants.
    fn ignored_columns(&mut self) -> Result<Columns, Fault> {
        let (mut named, mut all) = (Vec::new(), Vec::new());
        if self.is_word(0, "from") {
            return Ok(Columns::Ignored { named, all });
        }
        loop {
            let is_constant = match self.peek() {
                Kind::Number(_) | Kind::Text(_) => true,
                Kind::Word(word) => matches!(word.as_str(), "null" | "true" | "false"),
                _ => false,
            };
            if is_constant {
                self.skip();
            } else {
                match self.selected()? {
                    Selected::All(parts) => all.push(parts),
                    Selected::Column(parts) => named.push(parts),
                }
            }
            if !self.take(&Kind::Comma) {
                return Ok(Columns::Ignored { named, all });
            }
        }
    }

    /// A column, or a star, with its qualifiers.
    fn selected(&mut self) -> Result<Selected, Fault> {
        let mut parts = Vec::new();
        loop {
            if self.take(&Kind::Star) {
                return Ok(Selected::All(parts));
            }
            let place = self.place();
            if !self.is_name() {
                return Err(place.fault(format!(
                    "only columns of the table can be chosen, found {}",
                    self.peek().describe()
                )));
            }
            parts.push(self.name("a column")?);
            match self.peek() {
                Kind::Period => self.skip(),
                Kind::Open => {
                    return Err(place.fault("functions are not supported: choose columns or *"));
                }
                Kind::DoubleColon => {
                    return Err(self.place().fault("casts of columns are not supported"));
                }
                Kind::Word(word) if word == "as" => {
                    return Err(self.place().fault("renaming columns is not supported"));
                }
                Kind::Quoted(_) => {
                    return Err(self.place().fault("renaming columns is not supported"));
                }
                kind if kind.is_free_name() => {
                    return Err(self.place().fault("renaming columns is not supported"));
                }
                Kind::Minus | Kind::Plus | Kind::Star | Kind::Comparison(_) | Kind::Text(_) => {
                    return Err(self
                        .place()
                        .fault("only columns of the table can be chosen, no expressions"));
                }
                _ => return Ok(Selected::Column(parts)),
            }
        }
    }

    fn expression(&mut self) -> Result<Expression, Fault> {
        self.nested(Self::disjunction)
    }

    fn disjunction(&mut self) -> Result<Expression, Fault> {
        self.chain("or", Self::conjunction, Node::Or)
    }

    fn conjunction(&mut self) -> Result<Expression, Fault> {
        self.chain("and", Self::negation, Node::And)
    }

    fn chain(
        &mut self,
        word: &str,
        part: fn(&mut Self) -> Result<Expression, Fault>,
        node: fn(Vec<Expression>) -> Node,
    ) -> Result<Expression, Fault> {
        let first = part(self)?;
        if !self.is_word(0, word) {
            return Ok(first);
        }
        let place = first.place;
        let mut parts = vec![first];
        while self.take_word(word) {
            parts.push(part(self)?);
        }
        Ok(Expression {
            place,
            node: node(parts),
        })
    }

    fn negation(&mut self) -> Result<Expression, Fault> {
        let place = self.place();
        if !self.take_word("not") {
            return self.test();
        }
        let inner = self.nested(Self::negation)?;
        Ok(Expression {
            place,
            node: Node::Not(Box::new(inner)),
        })
    }

    /// `a IS …`, any number of times: a test of a test is one, too.
    fn test(&mut self) -> Result<Expression, Fault> {
        let mut tested = self.comparison()?;
        for _ in 0..=CHAIN_MAX {
            let place = tested.place;
            let node = if self.take_word("isnull") {
                Node::IsNull {
                    negated: false,
                    left: Box::new(tested),
                }
            } else if self.take_word("notnull") {
                Node::IsNull {
                    negated: true,
                    left: Box::new(tested),
                }
            } else if self.take_word("is") {
                self.is(Box::new(tested))?
            } else {
                return Ok(tested);
            };
            // Here Postgres would not know which IS binds first.
            let is_distinct = matches!(node, Node::Distinct { .. });
            tested = Expression { place, node };
            let again = ["is", "isnull", "notnull"];
            if is_distinct && again.iter().any(|word| self.is_word(0, word)) {
                return Err(self
                    .place()
                    .fault("a test after IS DISTINCT FROM needs parentheses"));
            }
        }
        Err(self.too_deep())
    }

    /// What comes after IS.
    fn is(&mut self, left: Box<Expression>) -> Result<Node, Fault> {
        let negated = self.take_word("not");
        if self.take_word("null") {
            return Ok(Node::IsNull { negated, left });
        }
        if self.take_word("distinct") {
            self.expect_word("from")?;
            let right = Box::new(self.comparison()?);
            return Ok(Node::Distinct {
                negated,
                left,
                right,
            });
        }
        let truth = if self.take_word("true") {
            Truth::True
        } else if self.take_word("false") {
            Truth::False
        } else if self.take_word("unknown") {
            Truth::Unknown
        } else {
            return Err(self.unexpected("NULL, TRUE, FALSE, UNKNOWN or DISTINCT FROM"));
        };
        Ok(Node::IsTruth {
            negated,
            truth,
            left,
        })
    }

    fn comparison(&mut self) -> Result<Expression, Fault> {
        let left = self.range()?;
        let &Kind::Comparison(comparison) = self.peek() else {
            return Ok(left);
        };
        self.skip();
        let place = left.place;
        let left = Box::new(left);
        let any = self.is_word(0, "any") || self.is_word(0, "some");
        let node = if any || self.is_word(0, "all") {
            self.skip();
            if self.is_subquery() {
                let negated = match (comparison, any) {
                    (Comparison::Equal, true) => false,
                    (Comparison::NotEqual, false) => true,
                    _ => {
                        return Err(self.place().fault(
                            "before a subquery only IN, NOT IN, = ANY and <> ALL are supported",
                        ));
                    }
                };
                let node = self.in_select(negated, *left)?;
                return self.not_compared(Expression { place, node });
            }
            self.expect(&Kind::Open)?;
            let array = Box::new(self.expression()?);
            self.expect(&Kind::Close)?;
            Node::Quantified {
                comparison,
                all: !any,
                left,
                array,
            }
        } else {
            Node::Compare(comparison, left, Box::new(self.range()?))
        };
        self.not_compared(Expression { place, node })
    }

    fn not_compared(&self, comparison: Expression) -> Result<Expression, Fault> {
        match self.peek() {
            Kind::Comparison(_) => Err(self
                .place()
                .fault("two comparisons in a row need parentheses")),
            _ => Ok(comparison),
        }
    }

    /// `(SELECT …)`, to which `left` is compared.
    fn in_select(&mut self, negated: bool, left: Expression) -> Result<Node, Fault> {
        let left = match left.node {
            Node::Row(left) => left,
            _ => vec![left],
        };
        Ok(Node::InSelect {
            negated,
            left,
            select: Box::new(self.subselect(Role::In)?),
        })
    }

    /// `(SELECT …)`
    fn subselect(&mut self, role: Role) -> Result<Statement, Fault> {
        self.expect(&Kind::Open)?;
        let statement = self.subquery(|cursor| cursor.statement(role))?;
        self.expect(&Kind::Close)?;
        Ok(statement)
    }

    /// BETWEEN, IN and LIKE.
    fn range(&mut self) -> Result<Expression, Fault> {
        let left = self.operand()?;
        let is_range = |parser: &Self, ahead| {
            ["between", "in", "like"]
                .iter()
                .any(|w| parser.is_word(ahead, w))
        };
        let negated = self.is_word(0, "not") && is_range(self, 1);
        if negated {
            self.skip();
        }
        if !is_range(self, 0) {
            return Ok(left);
        }
        let place = left.place;
        let left = Box::new(left);
        let node = if self.take_word("between") {
            let symmetric = self.take_word("symmetric");
            if !symmetric {
                self.take_word("asymmetric");
            }
            let low = Box::new(self.operand()?);
            self.expect_word("and")?;
            let high = Box::new(self.operand()?);
            Node::Between {
                negated,
                symmetric,
                left,
                low,
                high,
            }
        } else if self.take_word("in") {
            self.in_list(negated, left)?
        } else {
            self.expect_word("like")?;
            if self.is_word(0, "any") || self.is_word(0, "all") || self.is_word(0, "some") {
                return Err(self
                    .place()
                    .fault("LIKE ANY and LIKE ALL are not supported"));
            }
            let pattern = Box::new(self.operand()?);
            let escape = if self.take_word("escape") {
                let place = self.place();
                match self.advance() {
                    Kind::Text(text) => Some(text),
                    _ => {
                        return Err(place.fault(
                            "ESCAPE must be followed by a string of one character, or none",
                        ));
                    }
                }
            } else {
                None
            };
            Node::Like {
                negated,
                left,
                pattern,
                escape,
            }
        };
        if is_range(self, 0) || (self.is_word(0, "not") && is_range(self, 1)) {
            return Err(self
                .place()
                .fault("BETWEEN, IN or LIKE twice in a row need parentheses"));
        }
        Ok(Expression { place, node })
    }

    /// What comes after IN.
    fn in_list(&mut self, negated: bool, left: Box<Expression>) -> Result<Node, Fault> {
        if self.is_subquery() {
            return self.in_select(negated, *left);
        }
        self.expect(&Kind::Open)?;
        let mut list = vec![self.expression()?];
        while self.take(&Kind::Comma) {
            list.push(self.expression()?);
        }
        self.expect(&Kind::Close)?;
        Ok(Node::In {
            negated,
            left,
            list,
        })
    }

    /// A column, constant or parameter, with its sign and casts; or an expression in parentheses.
    fn operand(&mut self) -> Result<Expression, Fault> {
        let place = self.place();
        if self.take(&Kind::Plus) {
            let inner = self.nested(Self::operand)?;
            return match inner.node {
                Node::Number(_) => Ok(inner),
                _ => Err(place.fault("arithmetic (`+`) is not supported")),
            };
        }
        if self.take(&Kind::Minus) {
            let inner = self.nested(Self::operand)?;
            let node = match inner.node {
                // As Postgres does: the sign belongs to the number, so that -2147483648 is an int4.
                Node::Number(number) => Node::Number(match number.strip_prefix('-') {
                    Some(positive) => positive.to_owned(),
                    None => format!("-{number}"),
                }),
                node => Node::Negate(Box::new(Expression {
                    place: inner.place,
                    node,
                })),
            };
            return Ok(Expression { place, node });
        }
        let mut operand = self.primary()?;
        let mut casts = 0;
        while self.take(&Kind::DoubleColon) {
            casts += 1;
            if casts > CHAIN_MAX {
                return Err(self.too_deep());
            }
            let name = self.type_name()?;
            operand = Expression {
                place: operand.place,
                node: Node::Cast(Box::new(operand), name),
            };
        }
        match self.peek() {
            Kind::Plus | Kind::Minus | Kind::Star => {
                let operator = self.peek().describe();
                Err(self
                    .place()
                    .fault(format!("arithmetic ({operator}) is not supported")))
            }
            Kind::OpenBracket => Err(self.place().fault("elements of arrays are not supported")),
            Kind::Period => Err(self.place().fault("fields of composites are not supported")),
            _ => Ok(operand),
        }
    }

    fn primary(&mut self) -> Result<Expression, Fault> {
        let place = self.place();
        let node = match self.peek().clone() {
            Kind::Open => return self.parentheses(),
            Kind::Number(number) => {
                self.skip();
                Node::Number(number)
            }
            Kind::Text(text) => {
                self.skip();
                if matches!(self.peek(), Kind::Text(_)) {
                    return Err(self.place().fault("two strings in a row: write one"));
                }
                Node::Text(text)
            }
            Kind::Param(name) => {
                self.skip();
                Node::Param(name)
            }
            Kind::Word(word)
                if matches!(word.as_str(), "true" | "false" | "null" | "cast" | "array") =>
            {
                self.skip();
                match word.as_str() {
                    "true" => Node::Boolean(true),
                    "false" => Node::Boolean(false),
                    "null" => Node::Null,
                    "cast" => {
                        self.expect(&Kind::Open)?;
                        let inner = self.expression()?;
                        self.expect_word("as")?;
                        let name = self.type_name()?;
                        self.expect(&Kind::Close)?;
                        Node::Cast(Box::new(inner), name)
                    }
                    _ => self.array(place)?,
                }
            }
            Kind::Word(word) if word == "exists" && *self.peek_at(1) == Kind::Open => {
                self.skip();
                Node::Exists(Box::new(self.subselect(Role::Exists)?))
            }
            Kind::Word(word) if word == "row" && *self.peek_at(1) == Kind::Open => {
                return Err(place.fault("rows can't be compared; compare each column"));
            }
            Kind::Word(_) | Kind::Quoted(_) if self.is_name() => self.named(place)?,
            other => {
                return Err(place.fault(format!(
                    "expected a column, a constant or a parameter, found {}",
                    other.describe()
                )));
            }
        };
        Ok(Expression { place, node })
    }

    fn parentheses(&mut self) -> Result<Expression, Fault> {
        let place = self.place();
        if self.is_subquery() {
            return Err(place.fault(
                "a subquery can stand only in the parentheses of IN, = ANY, <> ALL and EXISTS",
            ));
        }
        self.skip();
        let inner = self.expression()?;
        if *self.peek() != Kind::Comma {
            self.expect(&Kind::Close)?;
            return Ok(inner);
        }
        let mut row = vec![inner];
        while self.take(&Kind::Comma) {
            row.push(self.expression()?);
        }
        self.expect(&Kind::Close)?;
        Ok(Expression {
            place,
            node: Node::Row(row),
        })
    }

    fn array(&mut self, place: Place) -> Result<Node, Fault> {
        if *self.peek() == Kind::Open {
            return Err(
                place.fault("an array of a subquery is not supported: write = ANY (SELECT …)")
            );
        }
        self.expect(&Kind::OpenBracket)?;
        let mut elements = Vec::new();
        if !self.take(&Kind::CloseBracket) {
            loop {
                elements.push(self.expression()?);
                if !self.take(&Kind::Comma) {
                    break;
                }
            }
            self.expect(&Kind::CloseBracket)?;
        }
        Ok(Node::Array(elements))
    }

    /// `type '…'` or a column.
    fn named(&mut self, place: Place) -> Result<Node, Fault> {
        let start = self.mark();
        if let Ok(name) = self.type_name()
            && let Kind::Text(text) = self.peek().clone()
        {
            self.skip();
            let inner = Expression {
                place,
                node: Node::Text(text),
            };
            return Ok(Node::Cast(Box::new(inner), name));
        }
        self.back_to(start);
        let parts = self.dotted_name("a column")?;
        if *self.peek() == Kind::Open {
            let name: Vec<_> = parts.iter().map(|part| part.text.as_str()).collect();
            return Err(place.fault(format!("functions are not supported: {}()", name.join("."))));
        }
        Ok(Node::Column(parts))
    }
}
