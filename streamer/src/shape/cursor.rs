//! Tokens in a row, read one after the other.

use super::{
    lex::{Kind, Token, tokens},
    syntax::{Fault, Name, Place},
};

/// Most subqueries of one SELECT. Each may need two indexes in the mirror, which every change of their tables keeps up.
pub const SUBQUERIES_MAX: usize = 16;

/// Deepest nesting of parentheses, NOT and signs. Bounds the stack that compiling and evaluating take.
pub const DEPTH_MAX: usize = 50;

/// The tokens, and where the next one is.
pub struct Cursor {
    tokens: Vec<Token>,
    next: usize,
    depth: usize,
    subqueries: usize,
}

impl Cursor {
    /// At the beginning of `sql`.
    pub fn new(sql: &str) -> Result<Cursor, Fault> {
        Ok(Cursor {
            tokens: tokens(sql)?,
            next: 0,
            depth: 0,
            subqueries: 0,
        })
    }

    /// What was read last.
    pub fn last(&self) -> &Kind {
        &self.tokens[self.next.saturating_sub(1).min(self.tokens.len() - 1)].kind
    }

    /// Skips a token that was peeked at.
    pub fn skip(&mut self) {
        self.next += 1;
    }

    /// Where it is, to come back to with [`Self::back_to`].
    pub fn mark(&self) -> usize {
        self.next
    }

    /// Goes back to a mark.
    pub fn back_to(&mut self, mark: usize) {
        self.next = mark;
    }

    /// The next token.
    pub fn peek(&self) -> &Kind {
        self.peek_at(0)
    }

    /// The token `ahead` of the next.
    pub fn peek_at(&self, ahead: usize) -> &Kind {
        let last = self.tokens.len() - 1;
        &self.tokens[(self.next + ahead).min(last)].kind
    }

    /// Where the next token is.
    pub fn place(&self) -> Place {
        self.tokens[self.next.min(self.tokens.len() - 1)].place
    }

    /// Takes the next token.
    pub fn advance(&mut self) -> Kind {
        let kind = self.peek().clone();
        self.next += 1;
        kind
    }

    /// Takes the next token if it is `kind`.
    pub fn take(&mut self, kind: &Kind) -> bool {
        let found = self.peek() == kind;
        self.next += usize::from(found);
        found
    }

    /// Whether the token `ahead` of the next is the unquoted `word`.
    pub fn is_word(&self, ahead: usize, word: &str) -> bool {
        matches!(self.peek_at(ahead), Kind::Word(found) if found == word)
    }

    /// Takes the next token if it is the unquoted `word`.
    pub fn take_word(&mut self, word: &str) -> bool {
        let found = self.is_word(0, word);
        self.next += usize::from(found);
        found
    }

    /// Takes `kind`, or refuses what is there instead.
    pub fn expect(&mut self, kind: &Kind) -> Result<(), Fault> {
        if self.take(kind) {
            return Ok(());
        }
        Err(self.unexpected(&kind.describe()))
    }

    /// Takes the unquoted `word`, or refuses what is there instead.
    pub fn expect_word(&mut self, word: &str) -> Result<(), Fault> {
        if self.take_word(word) {
            return Ok(());
        }
        Err(self.unexpected(&word.to_ascii_uppercase()))
    }

    /// The next token is not what is `wanted` here.
    pub fn unexpected(&self, wanted: &str) -> Fault {
        self.place().fault(format!(
            "expected {wanted}, found {}",
            self.peek().describe()
        ))
    }

    /// It is nested too deep here.
    pub fn too_deep(&self) -> Fault {
        self.place()
            .fault(format!("nested deeper than {DEPTH_MAX} levels"))
    }

    /// Runs `parse` one level deeper.
    pub fn nested<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        if self.depth == DEPTH_MAX {
            return Err(self.too_deep());
        }
        self.depth += 1;
        let result = parse(self);
        self.depth -= 1;
        result
    }

    /// Runs `parse`, which reads a subquery.
    pub fn subquery<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        if self.subqueries == SUBQUERIES_MAX {
            let reason = format!("one SELECT has more than {SUBQUERIES_MAX} subqueries");
            return Err(self.place().fault(reason));
        }
        self.subqueries += 1;
        parse(self)
    }

    /// Whether a subquery begins here, in parentheses.
    pub fn is_subquery(&self) -> bool {
        *self.peek() == Kind::Open && self.is_word(1, "select")
    }

    /// Whether the next token can be a name.
    pub fn is_name(&self) -> bool {
        matches!(self.peek(), Kind::Quoted(_)) || self.peek().is_free_name()
    }

    /// Takes a name.
    pub fn name(&mut self, wanted: &str) -> Result<Name, Fault> {
        let place = self.place();
        if !self.is_name() {
            return Err(self.unexpected(wanted));
        }
        match self.advance() {
            Kind::Word(text) | Kind::Quoted(text) => Ok(Name { text, place }),
            _ => Err(place.fault(format!("expected {wanted}"))),
        }
    }

    /// Takes a name with its qualifiers.
    pub fn dotted_name(&mut self, wanted: &str) -> Result<Vec<Name>, Fault> {
        let mut parts = vec![self.name(wanted)?];
        while self.take(&Kind::Period) {
            if *self.peek() == Kind::Star {
                return Err(self
                    .place()
                    .fault("whole rows can't be compared; compare each column"));
            }
            parts.push(self.name("a name")?);
        }
        Ok(parts)
    }
}
