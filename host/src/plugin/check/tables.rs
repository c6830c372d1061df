//! Tables of a curriculum's report: few, small, rectangular, and safe to print.

use super::{Fault, bad, printable, size, wit};
use crate::types::Table;

const MAX_TABLES: usize = 8;
const MAX_COLUMNS: usize = 16;
const MAX_ROWS: usize = 64;
const MAX_NOTES: usize = 16;
/// Titles, heads, cells and notes of one report together.
const MAX_REPORT_BYTES: usize = 64 << 10;
/// Of a title in an error.
const MAX_SHOWN_BYTES: usize = 100;

/// Checks a report and escapes its texts.
///
/// # Errors
/// A limit that is passed, an empty title, and rows that have not one cell per column.
pub(super) fn report(tables: Vec<wit::Table>) -> Result<Vec<Table>, Fault> {
    size("tables of one report", tables.len(), MAX_TABLES)?;
    let bytes = tables.iter().flat_map(texts).map(String::len).sum();
    size("bytes of one report", bytes, MAX_REPORT_BYTES)?;
    tables.into_iter().map(table).collect()
}

fn texts(table: &wit::Table) -> impl Iterator<Item = &String> {
    let cells = table.rows.iter().flatten();
    let heads = table.columns.iter().chain(&table.notes);
    heads.chain(cells).chain([&table.title])
}

fn table(table: wit::Table) -> Result<Table, Fault> {
    if table.title.is_empty() {
        return Err(bad("a table without a title"));
    }
    let columns = table.columns;
    // A title that fills the report would fill the error as well.
    let title = printable(&table.title, MAX_SHOWN_BYTES);
    if columns.is_empty() {
        return Err(bad(&format!("table `{title}` without columns")));
    }
    size("columns of one table", columns.len(), MAX_COLUMNS)?;
    size("rows of one table", table.rows.len(), MAX_ROWS)?;
    size("notes of one table", table.notes.len(), MAX_NOTES)?;
    let expected = columns.len();
    let ragged = |row: &Vec<String>| row.len() != expected;
    if let Some(index) = table.rows.iter().position(ragged) {
        let found = table.rows[index].len();
        return Err(bad(&format!(
            "row {index} of table `{title}` with {found} cells for {expected} columns"
        )));
    }
    let safe = |texts: Vec<String>| -> Vec<String> {
        let texts = texts.iter();
        texts.map(|t| printable(t, MAX_REPORT_BYTES)).collect()
    };
    Ok(Table {
        title: printable(&table.title, MAX_REPORT_BYTES),
        rows: table.rows.into_iter().map(safe).collect(),
        columns: safe(columns),
        notes: safe(table.notes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(columns: usize, rows: &[usize]) -> wit::Table {
        let cells = |n: &usize| vec!["1".to_owned(); *n];
        wit::Table {
            title: "t".to_owned(),
            columns: cells(&columns),
            rows: rows.iter().map(cells).collect(),
            notes: Vec::new(),
        }
    }

    fn too_many(what: &'static str, found: u64, limit: u64) -> Result<Vec<Table>, Fault> {
        Err(Fault::Size { what, found, limit })
    }

    #[test]
    fn tables_are_rectangular() {
        assert_eq!(report(vec![of(2, &[2, 2])]).unwrap()[0].rows.len(), 2);
        let ragged = "row 1 of table `t` with 3 cells for 2 columns";
        assert_eq!(report(vec![of(2, &[2, 3])]), Err(bad(ragged)));
        assert_eq!(
            report(vec![of(0, &[])]),
            Err(bad("table `t` without columns"))
        );
        let untitled = wit::Table {
            title: String::new(),
            ..of(1, &[])
        };
        assert_eq!(report(vec![untitled]), Err(bad("a table without a title")));
    }

    #[test]
    fn tables_are_few_and_small() {
        let tables = |n: usize| (0..n).map(|_| of(1, &[])).collect();
        assert_eq!(report(tables(8)).unwrap().len(), 8);
        assert_eq!(report(tables(9)), too_many("tables of one report", 9, 8));
        assert!(report(vec![of(16, &[16; 64])]).is_ok());
        assert_eq!(
            report(vec![of(17, &[])]),
            too_many("columns of one table", 17, 16)
        );
        assert_eq!(
            report(vec![of(1, &[1; 65])]),
            too_many("rows of one table", 65, 64)
        );
        let noted = |notes: Vec<String>| wit::Table {
            notes,
            ..of(1, &[1])
        };
        assert_eq!(
            report(vec![noted(vec![String::new(); 17])]),
            too_many("notes of one table", 17, 16)
        );
        // Title, head and cell have a byte each.
        let long = |n: usize| report(vec![noted(vec!["x".repeat(n)])]);
        assert!(long((64 << 10) - 3).is_ok());
        assert_eq!(
            long((64 << 10) - 2),
            too_many("bytes of one report", 65537, 65536)
        );
    }

    #[test]
    fn texts_cannot_move_the_cursor() {
        let table = wit::Table {
            title: "a\nb".to_owned(),
            columns: vec!["\u{1b}[2J".to_owned()],
            rows: vec![vec!["\r<b>".to_owned()]],
            notes: vec!["\u{202e}x".to_owned()],
        };
        let shown = Table {
            title: "a\\nb".to_owned(),
            columns: vec!["\\u{1b}[2J".to_owned()],
            rows: vec![vec!["\\r<b>".to_owned()]],
            notes: vec!["\\u{202e}x".to_owned()],
        };
        assert_eq!(report(vec![table]), Ok(vec![shown]));
    }
}
