//! Line charts as inline SVG, and escaping for HTML.

use std::fmt::Write;

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 24.0;

const COLOURS: [&str; 6] = [
    "#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2",
];

/// One line: its name and `(step, value)` in rising order of steps.
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    pub(super) points: Vec<(f64, f64)>,
}

/// Text that is safe between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are not allowed in HTML, and completions hold anything.
            c if c.is_control() && !"\n\t".contains(c) => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A chart of one or more lines over steps; at least one of them must have a point.
pub(super) fn chart(series: &[Series<'_>]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let (x0, x1) = range(points().map(|p| p.0));
    let (y0, y1) = range(points().map(|p| p.1));
    let x = |v: f64| LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    let y = |v: f64| HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for tick in [y0, f64::midpoint(y0, y1), y1] {
        // Writing to a String cannot fail.
        _ = write!(
            out,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{h:.1}\" y2=\"{h:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y(tick) + 4.0,
            number(tick),
            h = y(tick),
        );
    }
    for (step, anchor) in [(x0, "start"), (x1, "end")] {
        _ = write!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            x(step),
            HEIGHT - 6.0,
            number(step),
        );
    }
    for (i, s) in series.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let path: Vec<String> = s
            .points
            .iter()
            .map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1)))
            .collect();
        _ = write!(
            out,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{}\"><title>{}\
             </title></polyline>",
            path.join(" "),
            escape(s.name),
        );
        // A single point has no line.
        if let [p] = s.points[..] {
            _ = write!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                x(p.0),
                y(p.1)
            );
        }
    }
    out.push_str("</svg>");
    out
}

/// The colour of line `i`, for a legend.
pub(super) fn colour(i: usize) -> &'static str {
    COLOURS[i % COLOURS.len()]
}

/// Four significant digits, without trailing zeros.
pub(super) fn number(value: f64) -> String {
    let magnitude = value.abs();
    if value == 0.0 {
        return "0".to_owned();
    }
    if !(1e-3..1e6).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    let decimals = (3.0 - magnitude.log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// Extremes, spread a little when they coincide so that nothing is divided by zero.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    if low < high {
        (low, high)
    } else if low.is_finite() {
        let pad = (low.abs() * 0.1).max(0.5);
        (low - pad, low + pad)
    } else {
        (0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_lie_where_the_scale_puts_them() {
        let svg = chart(&[Series {
            name: "r",
            points: vec![(1.0, 0.0), (3.0, 1.0)],
        }]);
        // Left bottom corner of the plot, and right top.
        assert!(svg.contains("points=\"58.0,176.0 450.0,12.0\""), "{svg}");
    }

    #[test]
    fn constant_and_single_points_are_finite() {
        for points in [vec![(1.0, 2.0)], vec![(1.0, 2.0), (2.0, 2.0)], vec![]] {
            let svg = chart(&[Series { name: "r", points }]);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 1.0, 0.5, 1234.5678, 0.012_345_6, 1e-7, 2.5e9].map(number);
        assert_eq!(
            shown,
            ["0", "1", "0.5", "1235", "0.01235", "1.00e-7", "2.50e9"]
        );
    }

    #[test]
    fn text_cannot_leave_its_tag() {
        assert_eq!(
            escape("<a href=\"x\">'&\u{1b}\n"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;\u{fffd}\n"
        );
    }
}
