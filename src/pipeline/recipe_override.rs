//! Recipes whose keys a subscription replaces, and the words for what it must not write.

use serde_json::{Map, Value};

use super::recipe::{Recipe, RecipeError, value_error};

impl Recipe {
    /// This recipe with the keys of `overrides` replaced.
    ///
    /// # Errors
    /// An unknown key (the message suggests the nearest) or a value of the wrong kind.
    pub fn overridden(&self, overrides: &Map<String, Value>) -> Result<Self, RecipeError> {
        if let Some(crop) = overrides.get("crop").filter(|crop| !crop.is_object()) {
            let shape = "a table such as {\"kind\": \"center\", \"size\": 224}";
            return Err(value_error("crop", format!("{crop} is no crop; give {shape}")));
        }
        let merged = |overrides: &mut dyn Iterator<Item = (&String, &Value)>| {
            let mut merged = serde_json::to_value(self)?;
            if let Value::Object(keys) = &mut merged {
                keys.extend(overrides.map(|(key, value)| (key.clone(), value.clone())));
            }
            serde_json::from_value(merged)
        };
        merged(&mut overrides.iter()).map_err(|error| {
            // serde says what is wrong, and not where.
            let alone = |own| merged(&mut std::iter::once(own)).err().map(|error| (own.0, error));
            match overrides.iter().find_map(alone) {
                Some((key, error)) if !error.to_string().starts_with("unknown field") => {
                    value_error(key, in_words(&error.to_string()))
                }
                _ => RecipeError::Syntax(error.to_string()),
            }
        })
    }
}

/// With the words of users for Rust's and serde's types.
fn in_words(message: &str) -> String {
    let words = [
        ("u32", "a whole number, 0 or more"),
        ("u64", "a whole number, 0 or more"),
        ("usize", "a whole number, 0 or more"),
        ("f32", "a number"),
        ("f64", "a number"),
        ("a sequence", "a list"),
    ];
    let told = message.replacen("invalid type: sequence", "invalid type: a list", 1);
    let told = told.replacen("invalid type: map", "invalid type: a table", 1);
    let Some((found, expected)) = told.rsplit_once("expected ") else { return told };
    let word = words.iter().find(|(type_name, _)| expected == *type_name);
    let expected = word.map_or(expected, |(_, word)| word);
    format!("{found}expected {expected}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::recipe::Crop;
    use super::*;

    #[test]
    fn overrides_replace_whole_keys() {
        let Value::Object(overrides) =
            json!({"crop": {"kind": "center", "size": 8}, "hflip": true})
        else {
            panic!("an object")
        };
        let recipe = Recipe::default().overridden(&overrides).expect("valid");
        assert_eq!(recipe.crop, Crop::Center { size: 8, resize: None });
        assert!(recipe.hflip);
        assert_eq!(recipe.policy, "active");
    }
}
