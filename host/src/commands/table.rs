//! Tables of plugins on a terminal: columns aligned, numbers flush right.

use crate::types::Table;

/// Between two columns.
const GAP: &str = "  ";

/// The title, the table below it and its notes, a line each.
///
/// Widths are counted in characters: one of a wide script moves its row, which is still readable.
pub(super) fn lines(table: &Table) -> Vec<String> {
    let right = table.numeric_columns();
    let rows = || std::iter::once(&table.columns).chain(&table.rows);
    let width = |i: usize| rows().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).zip(&right);
        let cells: Vec<String> = cells
            .map(|((cell, &width), right)| match right {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            })
            .collect();
        format!("{GAP}{}", cells.join(GAP)).trim_end().to_owned()
    };
    let notes = table.notes.iter().map(|note| format!("{GAP}{note}"));
    let title = std::iter::once(table.title.clone());
    title.chain(rows().map(line)).chain(notes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_flush_right() {
        let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
        let table = Table {
            title: "Epoch 1".to_owned(),
            columns: row(["bucket", "rows", "share", "why"]),
            rows: vec![
                row(["hard", "120", "92.3 %", "x"]),
                row(["üb", "10", "7.7 %", "2"]),
                row(["all", "–", "100 %", ""]),
            ],
            notes: vec!["balance 0.15: lopsided".to_owned()],
        };
        assert_eq!(table.numeric_columns(), [false, true, true, false]);
        let expected = [
            "Epoch 1",
            "  bucket  rows   share  why",
            "  hard     120  92.3 %  x",
            "  üb        10   7.7 %  2",
            "  all        –   100 %",
            "  balance 0.15: lopsided",
        ];
        assert_eq!(lines(&table), expected);
    }

    #[test]
    fn a_table_without_rows_is_its_heads() {
        let table = Table {
            title: "t".to_owned(),
            columns: vec!["a".to_owned(), "b".to_owned()],
            ..Table::default()
        };
        assert_eq!(lines(&table), ["t", "  a  b"]);
    }
}
