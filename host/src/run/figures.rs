//! A page of charts and one table, for comparisons that are no part of a run.

use std::{fmt::Write, path::Path};

use super::{
    RunError, atomic, report,
    svg::{Series, escape},
};

/// A line of a chart: `(x, y)` in rising order of x, all finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// A chart; left out of the page when no line has a point.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    pub title: String,
    pub lines: Vec<Line>,
}

/// Writes charts and, below them, a table whose first row is its head, as one HTML file without scripts. An
/// earlier file is replaced.
pub fn write_figures(
    path: &Path,
    title: &str,
    figures: &[Figure],
    table: &[Vec<String>],
) -> Result<(), RunError> {
    // A bare file name has no folder to write beside.
    let path = std::path::absolute(path).map_err(|source| RunError::Write {
        path: path.to_owned(),
        source,
    })?;
    atomic::write(&path, page(title, figures, table).as_bytes())
}

fn page(title: &str, figures: &[Figure], table: &[Vec<String>]) -> String {
    let title = escape(title);
    let style = report::STYLE;
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{style}</style></head><body><h1>{title}</h1>\n<div class=\"charts\">"
    );
    for figure in figures {
        let lines = figure.lines.iter().filter(|line| !line.points.is_empty());
        let shown: Vec<Series<'_>> = lines.map(series).collect();
        out.push_str(&report::drawn(&escape(&figure.title), &shown));
    }
    out.push_str("</div>\n<table>");
    for (number, row) in table.iter().enumerate() {
        let cell = if number == 0 { "th" } else { "td" };
        out.push_str("<tr>");
        for text in row {
            // Writing to a String cannot fail.
            _ = write!(out, "<{cell}>{}</{cell}>", escape(text));
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></body></html>\n");
    out
}

fn series(line: &Line) -> Series<'_> {
    Series {
        name: &line.name,
        points: line.points.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_without_points_and_markup_in_cells_are_harmless() {
        let line = |name: &str, points: &[(f64, f64)]| Line {
            name: name.to_owned(),
            points: points.to_vec(),
        };
        let figure = Figure {
            title: "a<b".to_owned(),
            lines: vec![line("none", &[]), line("<i>", &[(0.0, 1.0), (1.0, 0.0)])],
        };
        let table = [vec!["head".to_owned()], vec!["<script>".to_owned()]];
        let html = page("t", &[figure], &table);
        assert_eq!(html.matches("<polyline").count(), 1, "{html}");
        assert!(html.contains("a&lt;b") && html.contains("<td>&lt;script&gt;</td>"));
        assert!(!html.contains("<i>") && !html.contains("<script>") && !html.contains("NaN"));
    }
}
