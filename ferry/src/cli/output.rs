//! Tables for people, JSON for machines.

use serde_json::Value;

use super::Format;

/// Prints rows: as a table with these columns, or as a JSON array of objects.
pub fn rows(format: Format, columns: &[&str], rows: &[Vec<Value>]) {
    match format {
        Format::Json => {
            let objects: Vec<Value> = rows
                .iter()
                .map(|row| {
                    columns.iter().map(|c| key(c)).zip(row.iter().cloned()).collect::<serde_json::Map<_, _>>()
                })
                .map(Value::Object)
                .collect();
            println!("{}", Value::Array(objects));
        }
        Format::Table => table(columns, rows),
    }
}

/// Prints one thing.
pub fn object(format: Format, fields: &[(&str, Value)]) {
    match format {
        Format::Json => {
            let object = fields.iter().map(|(k, v)| (key(k), v.clone())).collect();
            println!("{}", Value::Object(object));
        }
        Format::Table => {
            let width = fields.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
            fields.iter().for_each(|(k, v)| println!("{k:width$}  {}", text(v)));
        }
    }
}

fn key(column: &str) -> String {
    column.to_lowercase().replace(' ', "_")
}

pub fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn table(columns: &[&str], rows: &[Vec<Value>]) {
    let cells: Vec<Vec<String>> = rows.iter().map(|r| r.iter().map(text).collect()).collect();
    let width =
        |i: usize| cells.iter().map(|r| r[i].chars().count()).chain([columns[i].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(c, w)| format!("{c:w$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(columns.to_vec());
    cells.iter().for_each(|row| line(row.iter().map(String::as_str).collect()));
}
