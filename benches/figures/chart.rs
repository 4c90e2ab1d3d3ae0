// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A chart of ratios: bars with whiskers on a logarithmic axis, with a line at 1.

use std::path::Path;

use plotters::prelude::*;

use super::Spread;
use super::text::short;

const WIDTH: u32 = 900;
const ROW: u32 = 22;
const LABELS: u32 = 300;

/// Draws a bar for each ratio: median, with minimum and maximum as whiskers.
pub fn draw(file: &Path, title: &str, bars: &[(String, Spread)]) {
    let bars: Vec<_> = bars.iter().filter(|(_, spread)| spread.median.is_finite()).collect();
    let height = 70 + ROW * bars.len() as u32;
    let least = bars.iter().map(|(_, s)| s.min).fold(0.5, f64::min) / 1.2;
    let most = bars.iter().map(|(_, s)| s.max).fold(2.0, f64::max) * 1.6;
    let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).unwrap();
    let style = ("sans-serif", 13).into_font().color(&BLACK);
    root.draw(&Text::new(format!("Ratio (more is better): {title}"), (10, 8), style.clone()))
        .unwrap();
    let rows = bars.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(28)
        .margin_right(20)
        .x_label_area_size(28)
        .y_label_area_size(LABELS)
        .build_cartesian_2d((least..most).log_scale(), 0.0..rows)
        .unwrap();
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| short(*x))
        .draw()
        .unwrap();
    for (i, (what, spread)) in bars.iter().enumerate() {
        let y = rows - i as f64 - 0.5;
        let color =
            if spread.median >= 1.0 { RGBColor(46, 125, 90) } else { RGBColor(190, 90, 60) };
        let (from, to) = (spread.median.min(1.0), spread.median.max(1.0));
        let bar = Rectangle::new([(from, y - 0.3), (to, y + 0.3)], color.filled());
        let whisker = PathElement::new(vec![(spread.min, y), (spread.max, y)], BLACK);
        let ends = [spread.min, spread.max]
            .map(|x| PathElement::new(vec![(x, y - 0.15), (x, y + 0.15)], BLACK));
        chart.draw_series(std::iter::once(bar)).unwrap();
        chart.draw_series(std::iter::once(whisker).chain(ends)).unwrap();
        let at = chart.backend_coord(&(1.0, y));
        root.draw(&Text::new(what.clone(), (10, at.1 - 6), style.clone())).unwrap();
        let at = chart.backend_coord(&(spread.max.max(1.0), y));
        root.draw(&Text::new(short(spread.median), (at.0 + 6, at.1 - 6), style.clone())).unwrap();
    }
    let one = PathElement::new(vec![(1.0, 0.0), (1.0, rows)], BLACK.stroke_width(2));
    chart.draw_series(std::iter::once(one)).unwrap();
    root.present().unwrap();
}
