//! Tag filters: `*`, or tags separated by `||`. First the hash in the queue entry, then the exact text.

use crate::hash;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TagFilter {
    All,
    /// Tag codes beside their texts.
    Any(Vec<(i64, String)>),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("the tag expression {expression:?} holds no tag; write `*`, or `a || b`")]
    NoTag { expression: String },
    #[error("the tag {tag:?} contains '|'; tags are separated by `||`, as in `a || b`")]
    Bar { tag: String },
}

impl TagFilter {
    pub fn parse(expression: &str) -> Result<Self, FilterError> {
        let trimmed = expression.trim();
        if trimmed.is_empty() || trimmed == "*" {
            return Ok(TagFilter::All);
        }
        let tags: Vec<&str> = trimmed.split("||").map(str::trim).filter(|t| !t.is_empty()).collect();
        if tags.is_empty() {
            return Err(FilterError::NoTag { expression: expression.into() });
        }
        if let Some(tag) = tags.iter().find(|t| t.contains('|')) {
            return Err(FilterError::Bar { tag: (*tag).into() });
        }
        Ok(TagFilter::Any(tags.into_iter().map(|t| (hash::tag_code(Some(t)), t.to_owned())).collect()))
    }

    /// False only if no message with this code can match.
    pub fn may_match(&self, code: i64) -> bool {
        match self {
            TagFilter::All => true,
            TagFilter::Any(tags) => tags.iter().any(|(c, _)| *c == code),
        }
    }

    pub fn matches(&self, tag: Option<&str>) -> bool {
        match self {
            TagFilter::All => true,
            TagFilter::Any(tags) => tag.is_some_and(|tag| tags.iter().any(|(_, t)| t == tag)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        assert_eq!(TagFilter::parse("").unwrap(), TagFilter::All);
        assert_eq!(TagFilter::parse(" * ").unwrap(), TagFilter::All);
        assert!(TagFilter::parse("||").is_err());
        assert!(TagFilter::parse("a|b").is_err());
        let f = TagFilter::parse("a || b||").unwrap();
        assert!(f.matches(Some("a")) && f.matches(Some("b")));
        assert!(!f.matches(Some("c")) && !f.matches(None));
    }

    #[test]
    fn a_hash_collision_passes_the_hash_and_fails_the_text() {
        let f = TagFilter::parse("Aa").unwrap();
        assert!(f.may_match(hash::tag_code(Some("BB"))));
        assert!(!f.matches(Some("BB")));
    }
}
