//! What was measured, and its tables in Markdown.

use std::fmt::Write;

/// Samples of one thing, ascending.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// These samples, in any order.
    pub fn new(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// The smallest sample that so large a part (0 to 1) of all is not above (nearest rank); NaN if there is none.
    pub fn quantile(&self, part: f64) -> f64 {
        let rank = (part * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    /// `min / median / max`.
    pub fn spread(&self) -> String {
        [0.0, 0.5, 1.0].map(|part| digits(self.quantile(part))).join(" / ")
    }
}

/// Three digits, or all before the point.
fn digits(number: f64) -> String {
    let after = match number.abs() {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{number:.after$}")
}

/// One thing as it was measured of ours and, right beside, of what it is compared with.
#[derive(Clone, Debug)]
pub struct Pairs {
    what: String,
    bare: &'static str,
    pairs: Vec<(f64, f64)>,
}

impl Pairs {
    /// Nothing measured yet: what ours does, and what is beside it.
    pub fn new(what: impl Into<String>, bare: &'static str) -> Self {
        Self { what: what.into(), bare, pairs: Vec::new() }
    }

    /// What ours does.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Adds a sample of ours and the one beside it, in the table's unit.
    pub fn push(&mut self, ours: f64, bare: f64) {
        self.pairs.push((ours, bare));
    }

    fn row(&self) -> String {
        let ours = Series::new(self.pairs.iter().map(|pair| pair.0));
        let bare = Series::new(self.pairs.iter().map(|pair| pair.1));
        let ratio = Series::new(self.pairs.iter().map(|pair| pair.0 / pair.1));
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            self.what,
            self.pairs.len(),
            ours.spread(),
            digits(ours.quantile(0.99)),
            self.bare,
            bare.spread(),
            digits(bare.quantile(0.99)),
            ratio.spread()
        )
    }
}

/// A table under a heading: what its numbers are, and its rows.
#[derive(Clone, Debug)]
pub struct Table {
    heading: String,
    unit: &'static str,
    rows: Vec<Pairs>,
}

impl Table {
    /// A table of numbers in `unit`.
    pub fn new(heading: impl Into<String>, unit: &'static str, rows: impl IntoIterator<Item = Pairs>) -> Self {
        Self { heading: heading.into(), unit, rows: rows.into_iter().collect() }
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "### {} ({})\n\n\
             | Portolan | n | min / median / max | p99 | beside it | min / median / max | p99 | ratio of pairs: min / median / max |\n\
             |---|---|---|---|---|---|---|---|\n",
            self.heading, self.unit
        );
        for row in &self.rows {
            let _ = writeln!(text, "{}", row.row());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    pub fn quantiles_are_samples() {
        let series = Series::new((1..=200).rev().map(f64::from));
        let found = [0.0, 0.5, 0.99, 1.0].map(|part| series.quantile(part));
        assert_eq!(found, [1.0, 100.0, 198.0, 200.0]);
        assert_eq!(Series::new([7.0]).quantile(0.99), 7.0);
        assert!(Series::default().quantile(0.5).is_nan());
    }

    #[test]
    fn a_row_has_the_ratios_of_pairs_and_not_of_quantiles() {
        let mut pairs = Pairs::new("claim", "`zfs create`");
        pairs.push(10.0, 1.0);
        pairs.push(100.0, 50.0);
        pairs.push(4.0, 4.0);
        let row = pairs.row();
        assert_eq!(
            row,
            "| claim | 3 | 4.00 / 10.0 / 100 | 100 | `zfs create` | 1.00 / 4.00 / 50.0 | 50.0 | 1.00 / 2.00 / 10.0 |"
        );
        assert!(Table::new("Volumes", "ms", [pairs]).markdown().ends_with(&format!("|---|\n{row}\n")));
    }
}
