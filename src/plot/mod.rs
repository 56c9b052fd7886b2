//! Small SVG charts: points, lines, labels, error bars. Pure: numbers in, text out.
//!
//! A chart has its own light background, so that it reads the same on a page in light and in dark mode.

mod axis;

use axis::Axis;
use std::fmt::Write;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 46.0;
const BOTTOM: f64 = 58.0;

/// Okabe and Ito's colours, which colour-blind readers can tell apart.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// One set of points in a chart.
#[derive(Debug, Clone, Default)]
pub struct Series {
    name: String,
    points: Vec<Point>,
    line: bool,
    faint: bool,
}

/// One point, with what may stand beside it.
#[derive(Debug, Clone, Default)]
pub struct Point {
    pub x: f64,
    pub y: f64,
    /// The interval around `y`, e.g. of confidence.
    pub interval: Option<(f64, f64)>,
    pub label: String,
}

impl Series {
    /// Many small points without a line, e.g. raw measurements.
    pub fn dots(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points: plain(points), line: false, faint: true }
    }

    /// Points joined by a line.
    pub fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.into(), points: plain(points), line: true, faint: false }
    }

    /// Points with labels and intervals, joined by a line.
    pub fn labelled(name: &str, points: Vec<Point>) -> Self {
        Self { name: name.into(), points, line: true, faint: false }
    }

    fn drawable(&self) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(|p| p.x.is_finite() && p.y.is_finite())
    }
}

fn plain(points: Vec<(f64, f64)>) -> Vec<Point> {
    points.into_iter().map(|(x, y)| Point { x, y, ..Point::default() }).collect()
}

/// A chart as an SVG document. Points that are not numbers are left out.
pub fn chart(title: &str, x_label: &str, y_label: &str, series: &[Series]) -> String {
    let all = || series.iter().flat_map(Series::drawable);
    let ys = all().flat_map(|p| p.interval.map_or([p.y, p.y], |(low, high)| [low, high]));
    let x = Axis::over(all().map(|p| p.x), LEFT, WIDTH - RIGHT);
    let y = Axis::over(ys, HEIGHT - BOTTOM, TOP);
    let mut svg = String::new();
    // Writing to a string cannot fail, so the results are dropped throughout.
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">
<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fcfcfa"/>
<text x="{LEFT}" y="26" font-size="16" font-weight="bold">{}</text>"##,
        escape(title)
    );
    draw_axes(&mut svg, &x, &y, x_label, y_label);
    for (series, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        draw_series(&mut svg, series, colour, &x, &y);
    }
    draw_legend(&mut svg, series, &x, &y);
    svg.push_str("</svg>\n");
    svg
}

fn draw_axes(svg: &mut String, x: &Axis, y: &Axis, x_label: &str, y_label: &str) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for (value, text) in y.ticks() {
        let at = y.place(value);
        let _ = writeln!(
            svg,
            r##"<path d="M{LEFT} {at:.1}H{right}" stroke="#e2e2dc"/><text x="{:.1}" y="{:.1}" text-anchor="end" fill="#555">{text}</text>"##,
            LEFT - 8.0,
            at + 4.0
        );
    }
    for (value, text) in x.ticks() {
        let at = x.place(value);
        let _ = writeln!(
            svg,
            r##"<path d="M{at:.1} {bottom}v5" stroke="#888"/><text x="{at:.1}" y="{:.1}" text-anchor="middle" fill="#555">{text}</text>"##,
            bottom + 20.0
        );
    }
    let middle = (TOP + bottom) / 2.0;
    let _ = writeln!(
        svg,
        r##"<path d="M{LEFT} {bottom}H{right}" stroke="#888"/>
<text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>
<text x="18" y="{middle:.1}" text-anchor="middle" transform="rotate(-90 18 {middle:.1})">{}</text>"##,
        (LEFT + right) / 2.0,
        HEIGHT - 16.0,
        escape(x_label),
        escape(y_label)
    );
}

fn draw_series(svg: &mut String, series: &Series, colour: &str, x: &Axis, y: &Axis) {
    let places = series.drawable().map(|p| (x.place(p.x), y.place(p.y), p)).collect::<Vec<_>>();
    if series.line && places.len() > 1 {
        let path = places.iter().map(|(x, y, _)| format!("{x:.1} {y:.1}")).collect::<Vec<_>>().join("L");
        let _ = writeln!(svg, r#"<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>"#);
    }
    if series.faint {
        // Thousands of dots are one path of points with round ends: a fifth of the bytes of as many circles.
        let dots = places.iter().map(|(x, y, _)| format!("M{x:.1} {y:.1}h0")).collect::<String>();
        let _ = writeln!(
            svg,
            r#"<path d="{dots}" stroke="{colour}" stroke-width="2.8" stroke-linecap="round" opacity="0.35"/>"#
        );
        return;
    }
    for (px, py, point) in places {
        if let Some((low, high)) = point.interval {
            let (low, high) = (y.place(low), y.place(high));
            let _ =
                writeln!(svg, r#"<path d="M{px:.1} {low:.1}V{high:.1}" stroke="{colour}" opacity="0.5"/>"#);
        }
        let _ = writeln!(svg, r#"<circle cx="{px:.1}" cy="{py:.1}" r="4" fill="{colour}"/>"#);
        if !point.label.is_empty() {
            // To the right below its point, or near the right edge to the left above: a rising line passes between.
            let near_edge = px > WIDTH - 160.0;
            let (x, y, anchor) =
                if near_edge { (px - 9.0, py - 7.0, "end") } else { (px + 9.0, py + 17.0, "start") };
            let _ = writeln!(
                svg,
                r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
                escape(&point.label)
            );
        }
    }
}

/// In the upper corner on the side where the points stay lower.
fn draw_legend(svg: &mut String, series: &[Series], x: &Axis, y: &Axis) {
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let highest = |right: bool| {
        let points = series.iter().flat_map(Series::drawable).filter(|p| (x.place(p.x) > middle) == right);
        points.map(|p| y.place(p.y)).fold(HEIGHT, f64::min)
    };
    let left = highest(true) < highest(false);
    let (dot, text, anchor) = if left {
        (LEFT + 10.0, LEFT + 20.0, "start")
    } else {
        (WIDTH - RIGHT - 6.0, WIDTH - RIGHT - 16.0, "end")
    };
    let named = series.iter().zip(COLOURS.iter().cycle()).filter(|(s, _)| !s.name.is_empty());
    for (row, (series, colour)) in named.enumerate() {
        let y = TOP + 14.0 + 18.0 * row as f64;
        let _ = writeln!(
            svg,
            r#"<circle cx="{dot:.1}" cy="{:.1}" r="4" fill="{colour}"/><text x="{text:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            y - 4.5,
            escape(&series.name)
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_stands_where_the_points_are_low() {
        let legend = |points: &[(f64, f64)]| {
            let svg = chart("T", "x", "y", &[Series::line("name", points.to_vec())]);
            svg.lines().find(|l| l.contains(">name<")).unwrap().contains(r#"text-anchor="start""#)
        };
        assert!(legend(&[(0.0, 1.0), (1.0, 2.0)]), "a rising line leaves the left free");
        assert!(!legend(&[(0.0, 2.0), (1.0, 1.0)]));
    }

    #[test]
    fn a_chart_has_every_point_and_name_and_survives_what_is_no_number() {
        let point = Point { x: 1.0, y: 2.0, interval: Some((1.5, 2.5)), label: "a<b".into() };
        let series = [
            Series::labelled("first & last", vec![point]),
            Series::dots("", vec![(0.0, 1.0), (f64::NAN, 1.0), (2.0, f64::INFINITY)]),
        ];
        let svg = chart("T", "x", "y", &series);
        assert_eq!(svg.matches("h0").count(), 1, "of three dots one is a point");
        assert!(svg.contains("a&lt;b") && svg.contains("first &amp; last") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let empty = chart("T", "x", "y", &[]);
        assert!(empty.ends_with("</svg>\n") && !empty.contains("NaN"));
    }
}
