//! Line charts as SVG files.

use std::error::Error;
use std::iter::once;
use std::ops::Range;
use std::path::Path;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

/// Okabe and Ito's palette without its yellow: distinct for colour-blind readers too, and readable on white.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(0, 114, 178),
    RGBColor(204, 121, 167),
];

pub struct Series<'a> {
    pub name: &'a str,
    /// Picks the colour, so that a name can keep its colour over several charts.
    pub number: usize,
    pub points: Vec<(f64, f64)>,
    /// Half the height of each point's error bar; empty for a line without points and bars.
    pub deviations: Vec<f64>,
}

pub struct Axis<'a> {
    label: &'a str,
    log: bool,
    /// Of the values, or of their decimal logarithms.
    range: Range<f64>,
    /// Value and text.
    ticks: Vec<(f64, String)>,
}

impl<'a> Axis<'a> {
    /// Covers `values` with ticks at multiples of 1, 2 or 5 times a power of ten, `min_step` or more apart.
    pub fn linear(label: &'a str, values: impl Iterator<Item = f64>, min_step: f64) -> Self {
        let range = padded(values);
        let wanted = ((range.end - range.start) / 8.0).max(min_step);
        let magnitude = 10f64.powf(wanted.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * magnitude >= wanted).unwrap_or(10.0);
        let step = factor * magnitude;
        let decimals = -step.log10().floor().min(0.0) as usize;
        let first = (range.start / step).ceil() as i64;
        let last = (range.end / step).floor() as i64;
        let ticks = (first..=last)
            .map(|i| i as f64 * step)
            .map(|value| (value, format!("{value:.decimals$}")))
            .collect();
        Self { label, log: false, range, ticks }
    }

    /// A logarithmic axis if `values` are positive and differ by a factor of 20 or more, else a linear one from zero.
    pub fn magnitude(label: &'a str, values: impl Iterator<Item = f64> + Clone) -> Self {
        let (low, high) = extremes(values.clone());
        if !(low > 0.0 && high >= 20.0 * low) {
            return Self::linear(label, values.chain(once(0.0)), 0.0);
        }
        let range = padded(values.map(f64::log10));
        let mantissas: &[u32] = if range.end - range.start < 2.5 { &[1, 2, 5] } else { &[1] };
        let decades = range.start.floor() as i32..=range.end.floor() as i32;
        let ticks = decades
            .flat_map(|decade| mantissas.iter().map(move |&m| (decade, f64::from(m) * 10f64.powi(decade))))
            .map(|(decade, value)| (value, format!("{value:.*}", -decade.min(0) as usize)))
            .filter(|(value, _)| range.contains(&value.log10()))
            .collect();
        Self { label, log: true, range, ticks }
    }

    /// One tick per category, at 0, 1, 2, …
    pub fn categories(label: &'a str, names: impl Iterator<Item = String>) -> Self {
        let ticks: Vec<_> = names.enumerate().map(|(i, name)| (i as f64, name)).collect();
        Self { label, log: false, range: -0.3..ticks.len() as f64 - 0.7, ticks }
    }

    fn scale(&self, value: f64) -> f64 {
        if self.log { value.log10() } else { value }
    }
}

impl Ranged for Axis<'_> {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, &value: &f64, limit: (i32, i32)) -> i32 {
        let fraction = (self.scale(value) - self.range.start) / (self.range.end - self.range.start);
        limit.0 + (fraction * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|tick| tick.0).collect()
    }

    fn range(&self) -> Range<f64> {
        let value = |scaled: f64| if self.log { 10f64.powf(scaled) } else { scaled };
        value(self.range.start)..value(self.range.end)
    }
}

impl ValueFormatter<f64> for Axis<'_> {
    fn format_ext(&self, value: &f64) -> String {
        self.ticks.iter().find(|tick| tick.0 == *value).map(|tick| tick.1.clone()).unwrap_or_default()
    }
}

fn extremes(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// The range of `values` with a little room around, never empty.
fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = extremes(values);
    let room = if high > low { 0.04 * (high - low) } else { 0.5 };
    low - room..high + room
}

/// Draws `series` with a legend on the right.
pub fn draw(path: &Path, title: &str, x: Axis, y: Axis, series: &[Series]) -> Result<(), Box<dyn Error>> {
    const SIZE: (u32, u32) = (960, 520);
    // The SVG's reader chooses the font, so this leaves room for a wide one.
    let longest = series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0);
    let legend_width = 60 + 9 * longest as u32;

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let area = root.margin(10, 0, 0, 0).titled(title, ("sans-serif", 20))?;
    let (plot, legend) = area.split_horizontally(SIZE.0 - legend_width);
    let labels = (x.label, y.label);
    let mut chart = ChartBuilder::on(&plot)
        .margin(12)
        .set_label_area_size(LabelAreaPosition::Left, 70)
        .set_label_area_size(LabelAreaPosition::Bottom, 50)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .bold_line_style(BLACK.mix(0.12))
        .x_desc(labels.0)
        .y_desc(labels.1)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 17))
        .draw()?;

    for (line, one) in series.iter().enumerate() {
        let style = COLOURS[one.number % COLOURS.len()].stroke_width(2);
        chart.draw_series(LineSeries::new(one.points.iter().copied(), style))?;
        if !one.deviations.is_empty() {
            chart.draw_series(PointSeries::of_element(
                one.points.iter().copied(),
                4,
                style.filled(),
                &|at, size, style| Circle::new(at, size, style),
            ))?;
        }
        chart.draw_series(
            one.points.iter().zip(&one.deviations).map(|(&(x, y), deviation)| {
                PathElement::new([(x, y - deviation), (x, y + deviation)], style)
            }),
        )?;
        let height = 30 + 26 * line as i32;
        legend.draw(&PathElement::new([(4, height), (34, height)], style))?;
        legend.draw(&Text::new(one.name.to_owned(), (42, height - 8), ("sans-serif", 16)))?;
    }
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|tick| tick.1.clone()).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(
            texts(&Axis::linear("", [0.0, 30.0].into_iter(), 1.0)),
            ["0", "5", "10", "15", "20", "25", "30"]
        );
        assert_eq!(texts(&Axis::linear("", [0.0, 3.0].into_iter(), 1.0)), ["0", "1", "2", "3"]);
        assert_eq!(
            texts(&Axis::linear("", [0.61, 0.99].into_iter(), 0.0)),
            ["0.6", "0.7", "0.8", "0.9", "1.0"]
        );
        assert_eq!(texts(&Axis::linear("", [5.0].into_iter(), 0.0)), ["4.6", "4.8", "5.0", "5.2", "5.4"]);
    }

    #[test]
    fn magnitudes_get_a_log_axis_when_it_helps() {
        assert_eq!(
            texts(&Axis::magnitude("", [0.02, 2.1].into_iter())),
            ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
        );
        assert_eq!(texts(&Axis::magnitude("", [0.01, 100.0].into_iter())), ["0.01", "0.1", "1", "10", "100"]);
        assert_eq!(texts(&Axis::magnitude("", [4.0, 8.0].into_iter())), ["0", "2", "4", "6", "8"]);
        assert!(!Axis::magnitude("", [0.0, 8.0].into_iter()).log);
    }
}
