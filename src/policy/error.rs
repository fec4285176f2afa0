//! Why a policy, a policy file, a reference or a store operation is refused.

use std::io;

/// Every message names the place (policy, file, reference) and the cure.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A value breaks an invariant; the text names sub-policy and operation.
    #[error("policy '{name}': {problem}")]
    Invalid {
        /// The policy's name, or the file's.
        name: String,
        /// Place and cure.
        problem: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No such built-in policy, file, dataset or version.
    #[error("{message}")]
    NotFound {
        /// What was asked for, and what there is instead.
        message: String,
    },
    /// A name or reference is not well-formed.
    #[error("{message}")]
    Malformed {
        /// What is wrong with it, and what it should look like.
        message: String,
    },
    /// The store's state forbids the operation.
    #[error("{message}")]
    Conflict {
        /// Why, and what to do first.
        message: String,
    },
    /// A file of the store is damaged.
    #[error("{path} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong, and how to repair it.
        problem: String,
    },
}

impl PolicyError {
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::NotFound { message: message.into() }
    }

    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::Malformed { message: message.into() }
    }

    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::Conflict { message: message.into() }
    }

    pub(super) fn io(path: &std::path::Path, source: io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }
}

/// The candidate most like `word`, if one is like it at all.
fn nearest<'a>(word: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let lower = word.to_lowercase();
    candidates
        .iter()
        .map(|candidate| (strsim::jaro_winkler(&lower, &candidate.to_lowercase()), *candidate))
        .filter(|(likeness, _)| *likeness >= 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// What to write instead of `word`: the nearest candidate, or all of them.
pub(crate) fn suggestion(word: &str, candidates: &[&str]) -> String {
    match nearest(word, candidates) {
        Some(candidate) => format!("did you mean '{candidate}'?"),
        None if candidates.is_empty() => "there are none".to_owned(),
        None => format!("there are: {}", candidates.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_else_all() {
        let candidates = ["ShearX", "Rotate", "Posterize"];
        assert_eq!(suggestion("rotat", &candidates), "did you mean 'Rotate'?");
        assert_eq!(suggestion("Posterise", &candidates), "did you mean 'Posterize'?");
        assert_eq!(suggestion("qqq", &candidates), "there are: ShearX, Rotate, Posterize");
        assert_eq!(suggestion("qqq", &[]), "there are none");
    }
}
