//! Claims and the replica's choices become values of parameters.
//!
//! A JSON value becomes a parameter of a type so:
//! - bool: a boolean, or a string that Postgres' input of bool takes;
//! - int2, int4, int8, oid: a number without fraction, or a string that is one (tokens often carry ids as strings);
//! - float4, float8: a number, or a string;
//! - numeric: a number without fraction, or a string (a fraction would have lost digits in the JSON parser);
//! - text, name, char(n), an enum: a string;
//! - uuid, bytea, date, time, timestamp, timestamptz: a string in the form that constants have;
//! - an array of one of these: an array, without nulls.
//!
//! No error shows a value.

use std::collections::HashMap;

use serde_json::{Map, Value as Json};

use super::{
    BindError, ParamSource,
    datatype::DataType,
    evaluate::Argument,
    literal::{self, ARRAY_ELEMENTS_MAX, Constant},
    params::Param,
};

/// Longest JSON text of one parameter that a replica sends.
pub const PARAM_BYTES_MAX: usize = 64 * 1024;

/// Binds all parameters of the shape `shape`.
pub fn arguments(
    shape: &str,
    params: &[Param],
    claims: &Map<String, Json>,
    chosen: &HashMap<String, String>,
) -> Result<Vec<Argument>, BindError> {
    let refused = |name: &str, reason: String| {
        BindError::Parameter(shape.to_owned(), name.to_owned(), reason)
    };
    let mut unknown: Vec<_> = chosen
        .keys()
        .filter(|name| !is_choice(params, name))
        .collect();
    unknown.sort_unstable();
    if let Some(name) = unknown.first() {
        let name: String = name.chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(refused(
            &name,
            "it is not one that the replica may choose".to_owned(),
        ));
    }
    let mut arguments = Vec::with_capacity(params.len());
    for param in params {
        let parsed;
        let json = match &param.source {
            ParamSource::Claim(claim) => match claims.get(claim) {
                None | Some(Json::Null) => {
                    return Err(BindError::MissingClaim(claim.clone(), shape.to_owned()));
                }
                Some(json) => json,
            },
            ParamSource::Client(_) => {
                let Some(text) = chosen.get(&param.name) else {
                    return Err(refused(
                        &param.name,
                        "the replica must choose it".to_owned(),
                    ));
                };
                if text.len() > PARAM_BYTES_MAX {
                    return Err(refused(
                        &param.name,
                        format!("longer than {PARAM_BYTES_MAX} bytes"),
                    ));
                }
                let json: Result<Json, _> = serde_json::from_str(text);
                parsed = json.map_err(|_| refused(&param.name, "not a JSON value".to_owned()))?;
                &parsed
            }
        };
        arguments.push(argument(param, json).map_err(|reason| refused(&param.name, reason))?);
    }
    Ok(arguments)
}

fn is_choice(params: &[Param], name: &str) -> bool {
    params
        .iter()
        .any(|param| param.name == name && matches!(param.source, ParamSource::Client(_)))
}

fn argument(param: &Param, json: &Json) -> Result<Argument, String> {
    let usage = param.usage.as_ref().ok_or("its type is unknown")?;
    let data_type = &usage.data_type;
    match (json, usage.array) {
        (Json::Array(_), false) => {
            Err("an array, where one value is needed: use it with = ANY ($…)".to_owned())
        }
        (json, false) => constant(data_type, json).map(Argument::One),
        (Json::Array(elements), true) => {
            if elements.len() > ARRAY_ELEMENTS_MAX {
                return Err(format!(
                    "an array of more than {ARRAY_ELEMENTS_MAX} elements"
                ));
            }
            let constants: Result<_, _> = elements
                .iter()
                .map(|json| constant(data_type, json))
                .collect();
            constants.map(Argument::Many)
        }
        (_, true) => Err("one value, where an array is needed".to_owned()),
    }
}

fn constant(data_type: &DataType, json: &Json) -> Result<Constant, String> {
    let wanted = |what: &str| Err(format!("{what} is needed for {}", data_type.sql()));
    let is_integer = |json: &Json| json.is_i64() || json.is_u64();
    match (data_type, json) {
        (_, Json::Null) => Err("null, which is no value of a parameter".to_owned()),
        (_, Json::String(text)) => literal::read(data_type, text),
        (DataType::Bool, Json::Bool(value)) => literal::read(data_type, &value.to_string()),
        (DataType::Bool, _) => wanted("a boolean"),
        (
            DataType::Int2 | DataType::Int4 | DataType::Int8 | DataType::Oid,
            Json::Number(number),
        ) if is_integer(json) => literal::read(data_type, &number.to_string()),
        (DataType::Int2 | DataType::Int4 | DataType::Int8 | DataType::Oid, _) => {
            wanted("a number without fraction")
        }
        (DataType::Float4 | DataType::Float8, Json::Number(number)) => {
            literal::read(data_type, &number.to_string())
        }
        (DataType::Numeric, Json::Number(number)) if is_integer(json) => {
            literal::read(data_type, &number.to_string())
        }
        (DataType::Numeric, Json::Number(_)) => wanted("a string (or a number without fraction)"),
        (DataType::Float4 | DataType::Float8 | DataType::Numeric, _) => wanted("a number"),
        _ => wanted("a string"),
    }
}
