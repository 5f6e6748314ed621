//! The parameters of a shape, and the types that their uses give them.

use std::collections::BTreeMap;

use super::{
    ParamSource,
    datatype::DataType,
    syntax::{Fault, Place, TypeName},
};

/// A parameter.
#[derive(Clone, Debug)]
pub struct Param {
    /// Its name, without the `$`.
    pub name: String,
    /// Where its value comes from.
    pub source: ParamSource,
    /// Its type, or that of its elements, once a use or a declaration said it.
    pub usage: Option<Usage>,
    /// The config gave the type.
    declared: bool,
    /// Some SELECT uses it.
    pub used: bool,
}

/// The type of a parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Its type, or that of its elements.
    pub data_type: DataType,
    /// An array, used with ANY or ALL.
    pub array: bool,
}

/// The parameters of a shape, by name.
#[derive(Clone, Debug)]
pub struct Params(pub Vec<Param>);

impl Param {
    /// Whether its type, known by now, is not `data_type`, nor an integer like it.
    pub fn is_other_than(&self, data_type: &DataType) -> bool {
        self.usage.as_ref().is_some_and(|usage| {
            usage.data_type != *data_type
                && !(usage.data_type.is_integer() && data_type.is_integer())
        })
    }
}

impl Params {
    /// Those that the config declares; `resolve` knows the types.
    pub fn new(
        declared: &BTreeMap<String, ParamSource>,
        resolve: impl Fn(&TypeName) -> Result<DataType, String>,
    ) -> Result<Params, Fault> {
        let mut params = Vec::new();
        for (name, source) in declared {
            let usage = match source {
                ParamSource::Claim(_) => None,
                ParamSource::Client(type_name) => {
                    let fault =
                        |reason: String| Place::START.fault(format!("parameter ${name}: {reason}"));
                    let type_name = super::typename::type_name(type_name)
                        .map_err(|cause| fault(cause.reason))?;
                    if type_name.length.is_some() {
                        return Err(fault("a parameter's type has no length".to_owned()));
                    }
                    Some(Usage {
                        data_type: resolve(&type_name).map_err(fault)?,
                        array: type_name.array,
                    })
                }
            };
            params.push(Param {
                name: name.clone(),
                source: source.clone(),
                declared: usage.is_some(),
                usage,
                used: false,
            });
        }
        Ok(Params(params))
    }

    /// Notes that `name` is used as a `data_type` (or an array of it), and gives its place.
    pub fn use_as(
        &mut self,
        name: &str,
        place: Place,
        data_type: &DataType,
        array: bool,
    ) -> Result<usize, Fault> {
        let Some(index) = self.0.iter().position(|param| param.name == name) else {
            return Err(place.fault(format!("the shape declares no parameter `{name}`")));
        };
        let param = &mut self.0[index];
        param.used = true;
        match &mut param.usage {
            None => {
                param.usage = Some(Usage {
                    data_type: data_type.clone(),
                    array,
                });
            }
            Some(before) => {
                let same = before.data_type == *data_type;
                // Integers compare by value: the widest one takes them all.
                let integers = before.data_type.is_integer() && data_type.is_integer();
                if before.array != array || !(same || integers) {
                    let suffix = |array| if array { "[]" } else { "" };
                    let how = if param.declared {
                        "declared"
                    } else {
                        "used elsewhere"
                    };
                    return Err(place.fault(format!(
                        "${name} is {how} as {}{}, and here used as {}{}: one type only",
                        before.data_type.sql(),
                        suffix(before.array),
                        data_type.sql(),
                        suffix(array)
                    )));
                }
                if integers && !param.declared && width(data_type) > width(&before.data_type) {
                    before.data_type = data_type.clone();
                }
            }
        }
        Ok(index)
    }

    /// Those that no SELECT uses are refused: a condition that was meant to be there may be missing.
    pub fn check_all_used(&self) -> Result<(), Fault> {
        match self.0.iter().find(|param| !param.used) {
            None => Ok(()),
            Some(param) => {
                Err(Place::START.fault(format!("no SELECT uses the parameter `{}`", param.name)))
            }
        }
    }
}

fn width(integer: &DataType) -> u8 {
    match integer {
        DataType::Int2 => 2,
        DataType::Int4 => 4,
        _ => 8,
    }
}
