//! Configuration of a role: defaults < TOML file < environment < flags. An unknown key is an error that names
//! the nearest known one.
//!
//! Environment: `FERRY_` and the key in capitals, sections parted by two underscores: `FERRY_STORAGE__FLUSH=sync`.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

const PREFIX: &str = "FERRY_";
/// Variables with the prefix that are not keys.
const NOT_KEYS: [&str; 3] = ["FERRY_LOG", "FERRY_ENDPOINT", "FERRY_CACHE"];

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration {} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the configuration {} is not TOML: {source}", path.display())]
    Toml { path: PathBuf, source: Box<toml::de::Error> },
    #[error("configuration: {key}: {problem}")]
    Key { key: String, problem: String },
}

/// Reads a configuration. `flags` are pairs of dotted keys and values, in TOML's notation or as plain text.
pub fn load<T: DeserializeOwned>(
    file: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    flags: &[(String, String)],
) -> Result<T, ConfigError> {
    let mut table = match file {
        Some(path) => read(path)?,
        None => Table::new(),
    };
    for (name, text) in environment {
        let Some(key) = name.strip_prefix(PREFIX).filter(|_| !NOT_KEYS.contains(&name.as_str())) else {
            continue;
        };
        set(&mut table, &key.to_lowercase().replace("__", "."), &text);
    }
    flags.iter().for_each(|(key, text)| set(&mut table, key, text));
    serde_path_to_error::deserialize(Value::Table(table)).map_err(|e| {
        let path = e.path().to_string();
        let problem = e.into_inner().message().trim().to_owned();
        ConfigError::Key { problem: with_nearest(&problem), key: path }
    })
}

fn read(path: &Path) -> Result<Table, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
    text.parse().map_err(|e| ConfigError::Toml { path: path.into(), source: Box::new(e) })
}

fn set(table: &mut Table, key: &str, text: &str) {
    let value = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    let value = value.unwrap_or_else(|| Value::String(text.into()));
    let mut at = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            at.insert(part.into(), value);
            return;
        }
        let next = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(next) = next else { return };
        at = next;
    }
}

/// serde says "unknown field `flsh`, expected one of `flush`, …": name the nearest.
fn with_nearest(problem: &str) -> String {
    let Some((unknown, expected)) = problem.split_once("expected") else { return problem.into() };
    let quoted = |text: &str| text.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let Some(wrong) = quoted(unknown).into_iter().next().filter(|_| problem.starts_with("unknown field"))
    else {
        return problem.into();
    };
    match quoted(expected).into_iter().min_by_key(|known| strsim::levenshtein(&wrong, known)) {
        Some(nearest) => format!("unknown key `{wrong}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{wrong}`; there are no keys here"),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Config {
        name: String,
        storage: Storage,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Storage {
        flush: String,
        segment_bytes: u64,
    }

    fn env(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn file_then_environment_then_flags() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broker.toml");
        std::fs::write(&path, "name = 'file'\n[storage]\nflush = 'async'\nsegment_bytes = 1\n").unwrap();
        let environment = env(&[("FERRY_STORAGE__FLUSH", "sync"), ("FERRY_LOG", "x"), ("HOME", "/")]);
        let flags = [("storage.segment_bytes".to_owned(), "3".to_owned())];
        let config: Config = load(Some(&path), environment, &flags).unwrap();
        let storage = Storage { flush: "sync".into(), segment_bytes: 3 };
        assert_eq!(config, Config { name: "file".into(), storage });
    }

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = load::<Config>(None, env(&[("FERRY_STORAGE__FLSH", "sync")]), &[]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "configuration: storage.flsh: unknown key `flsh`; did you mean `flush`?"
        );
        let error = load::<Config>(None, env(&[("FERRY_STORAGE__SEGMENT_BYTES", "many")]), &[]).unwrap_err();
        assert!(error.to_string().contains("storage.segment_bytes"), "{error}");
    }
}
