//! File and environment as one tree that still knows where each value came from.
//!
//! The variables of the environment are laid over the file's tree *before* it becomes a struct, so that both go through
//! the same checks. Each variable gets a place behind the end of the text: that is how an error knows which of the two
//! it is about.

use std::{borrow::Cow, ffi::OsString, ops::Range, path::Path};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeArray, DeTable, DeValue},
};

/// What the names of our variables begin with.
pub const ENVIRONMENT_PREFIX: &str = "ANABRANCH_";

/// What is wrong with a config. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The file, or the variable of the environment.
    pub origin: String,
    /// Line and column from 1, where one place is to blame.
    pub place: Option<(usize, usize)>,
    /// The key, with dots between levels.
    pub field: Option<String>,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl Error {
    pub(super) fn unreadable(path: &Path, what: &str) -> Self {
        Error {
            origin: path.display().to_string(),
            place: None,
            field: None,
            what: what.into(),
        }
    }
}

impl std::error::Error for Error {}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.origin)?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        f.write_str(": ")?;
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.what)
    }
}

/// Turns spans into places and fields.
pub(super) struct Place {
    name: String,
    text: String,
    /// Variables, by how far behind the end of the text their values are said to be.
    variables: Vec<String>,
    /// Keys with the span from their name to the end of their value.
    fields: Vec<(Range<usize>, String)>,
}

impl Place {
    /// An error about the value at `span`.
    pub(super) fn error(&self, span: Range<usize>, what: &str) -> Error {
        let field = self
            .fields
            .iter()
            .filter(|(range, _)| range.contains(&span.start))
            .min_by_key(|(range, _)| range.len())
            .map(|(_, field)| field.clone());
        let (origin, place) = match span.start.checked_sub(self.text.len() + 1) {
            Some(variable) => (
                self.variables.get(variable).map_or_else(
                    || self.name.clone(),
                    |name| format!("environment variable {name}"),
                ),
                None,
            ),
            None => (self.name.clone(), Some(self.line_and_column(span.start))),
        };
        Error {
            origin,
            place,
            field,
            what: what.into(),
        }
    }

    /// An error about a field that is nowhere.
    pub(super) fn whole(&self, field: &str, what: &str) -> Error {
        Error {
            origin: self.name.clone(),
            place: None,
            field: Some(field.into()),
            what: what.into(),
        }
    }

    fn line_and_column(&self, offset: usize) -> (usize, usize) {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        let before = &self.text[..offset];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        (
            before.matches('\n').count() + 1,
            before[line_start..].chars().count() + 1,
        )
    }
}

/// The text of the file, and our variables, each with its path, in an order in which list places are filled from 0.
pub(super) struct Source {
    name: String,
    text: String,
    variables: Vec<(String, Vec<String>, OsString)>,
}

impl Source {
    /// Variables whose first level is none of `keys` are not ours.
    pub(super) fn new(
        text: &str,
        name: &str,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        keys: &[&str],
    ) -> Self {
        let mut variables: Vec<_> = environment
            .into_iter()
            .filter_map(|(name, value)| {
                let name = name.into_string().ok()?;
                let path: Vec<String> = name
                    .strip_prefix(ENVIRONMENT_PREFIX)?
                    .split("__")
                    .map(str::to_ascii_lowercase)
                    .collect();
                keys.contains(&path[0].as_str())
                    .then_some((name, path, value))
            })
            .collect();
        variables.sort_by_cached_key(|(_, path, _)| {
            path.iter()
                .map(|level| format!("{level:0>9}"))
                .collect::<Vec<_>>()
        });
        Source {
            name: name.into(),
            text: text.into(),
            variables,
        }
    }
}

/// The tree.
pub(super) struct Tree<'i>(Spanned<DeTable<'i>>);

impl<'i> Tree<'i> {
    /// Parses the text and lays the variables over it.
    pub(super) fn parse(source: &'i Source) -> Result<(Tree<'i>, Place), Error> {
        let mut place = Place {
            name: source.name.clone(),
            text: source.text.clone(),
            variables: source
                .variables
                .iter()
                .map(|(name, ..)| name.clone())
                .collect(),
            fields: Vec::new(),
        };
        let parsed = DeTable::parse(&source.text)
            .map_err(|error| place.error(error.span().unwrap_or(0..0), error.message()))?;
        let span = parsed.span();
        let mut table = parsed.into_inner();

        for (i, (_, path, value)) in source.variables.iter().enumerate() {
            let at = source.text.len() + 1 + i;
            let wrong = |what: &str| place.error(at..at + 1, what);
            let value = value.to_str().ok_or_else(|| wrong("is not UTF-8"))?;
            let value = read(path, value).map_err(|what| wrong(&what))?;
            put(&mut table, path, value, at..at + 1).map_err(|what| wrong(&what))?;
        }
        collect_fields(&table, "", &mut place.fields);
        Ok((Tree(Spanned::new(span, table)), place))
    }

    /// Makes a struct of it.
    pub(super) fn deserialize<T: DeserializeOwned>(self, place: &Place) -> Result<T, Error> {
        T::deserialize(toml::de::Deserializer::from(self.0)).map_err(|error| match error.span() {
            // What is missing is nowhere: the span is then that of the table that lacks it.
            Some(span) if span.start > 0 || !error.message().starts_with("missing field") => {
                place.error(span, error.message())
            }
            _ => Error {
                origin: place.name.clone(),
                place: None,
                field: None,
                what: error.message().into(),
            },
        })
    }
}

/// A string, except where the config holds something else: lists and parameters are written in TOML.
fn read<'i>(path: &[String], text: &'i str) -> Result<DeValue<'i>, String> {
    let string = DeValue::String(Cow::Borrowed(text));
    let parsed = DeValue::parse(text)
        .map(Spanned::into_inner)
        .map_err(|error| format!("is not a TOML value: {}", error.message()));
    match path {
        [list] | [list, _] if list == "subscribe" => parsed,
        [list, _, params] if list == "subscribe" && params == "params" => parsed,
        [list, _, params, _] if list == "subscribe" && params == "params" => {
            Ok(parsed.unwrap_or(string))
        }
        _ => Ok(string),
    }
}

/// Puts a value at its path; tables and list places on the way are made.
fn put<'i>(
    table: &mut DeTable<'i>,
    path: &'i [String],
    value: DeValue<'i>,
    span: Range<usize>,
) -> Result<(), String> {
    let Some((first, rest)) = path.split_first() else {
        return Ok(());
    };
    if rest.is_empty() {
        let key = Spanned::new(span.clone(), Cow::Borrowed(first.as_str()));
        // Removed first: a map keeps the old key, with the old place.
        table.remove(first.as_str());
        table.insert(key, moved(value, &span));
        return Ok(());
    }
    if !table.contains_key(first.as_str()) {
        let empty = match rest[0].parse::<usize>() {
            Ok(_) => DeValue::Array(DeArray::new()),
            Err(_) => DeValue::Table(DeTable::new()),
        };
        let key = Spanned::new(span.clone(), Cow::Borrowed(first.as_str()));
        table.insert(key, Spanned::new(span.clone(), empty));
    }
    match table.get_mut(first.as_str()).map(Spanned::get_mut) {
        Some(DeValue::Table(inner)) => put(inner, rest, value, span),
        Some(DeValue::Array(list)) => {
            let place: usize = rest[0]
                .parse()
                .map_err(|_| format!("`{}` is not a place in the list `{first}`", rest[0]))?;
            if place > list.len() {
                return Err(format!(
                    "`{first}` has {} entries so far; the next is {}",
                    list.len(),
                    list.len()
                ));
            }
            if place == list.len() {
                list.push(Spanned::new(span.clone(), DeValue::Table(DeTable::new())));
            }
            if rest.len() == 1 {
                list.as_mut()[place] = moved(value, &span);
                return Ok(());
            }
            match list.as_mut()[place].get_mut() {
                DeValue::Table(inner) => put(inner, &rest[1..], value, span),
                _ => Err(format!("entry {place} of `{first}` is not a table")),
            }
        }
        _ => Err(format!("`{first}` is a single value")),
    }
}

/// The value with all its spans at the place of its variable.
fn moved<'i>(value: DeValue<'i>, span: &Range<usize>) -> Spanned<DeValue<'i>> {
    let value = match value {
        DeValue::Array(list) => {
            let mut placed = DeArray::new();
            for item in list.iter() {
                placed.push(moved(item.get_ref().clone(), span));
            }
            DeValue::Array(placed)
        }
        DeValue::Table(table) => {
            let mut placed = DeTable::new();
            for (key, item) in table.iter() {
                placed.insert(
                    Spanned::new(span.clone(), key.get_ref().clone()),
                    moved(item.get_ref().clone(), span),
                );
            }
            DeValue::Table(placed)
        }
        single => single,
    };
    Spanned::new(span.clone(), value)
}

fn collect_fields(table: &DeTable<'_>, prefix: &str, fields: &mut Vec<(Range<usize>, String)>) {
    for (key, value) in table.iter() {
        let name = format!("{prefix}{}", key.get_ref());
        collect_value(value, &name, fields);
        fields.push((key.span().start..key.span().end.max(value.span().end), name));
    }
}

fn collect_value(
    value: &Spanned<DeValue<'_>>,
    name: &str,
    fields: &mut Vec<(Range<usize>, String)>,
) {
    match value.get_ref() {
        DeValue::Table(inner) => collect_fields(inner, &format!("{name}."), fields),
        DeValue::Array(list) => {
            for item in list.iter() {
                collect_value(item, name, fields);
                fields.push((item.span(), name.into()));
            }
        }
        _ => {}
    }
}
