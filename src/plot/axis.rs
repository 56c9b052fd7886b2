//! One axis: from values to places, and where its ticks stand.

/// Maps a range of values onto a range of places.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    step: f64,
    from: f64,
    to: f64,
}

/// About as many ticks as read well.
const TICKS: f64 = 6.0;

impl Axis {
    /// Covers all finite values with round numbers at both ends; `[0, 1]` where there is none.
    pub(super) fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let finite = values.filter(|v| v.is_finite());
        let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let (low, high) = match (low <= high, low < high) {
            (true, true) => (low, high),
            (true, false) => (low - 0.5, low + 0.5),
            _ => (0.0, 1.0),
        };
        let step = round_step((high - low) / TICKS);
        let (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        Self { low, high, step, from, to }
    }

    pub(super) fn place(&self, value: f64) -> f64 {
        self.from + (value - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// Values and texts of the ticks.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let decimals = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        let count = ((self.high - self.low) / self.step).round() as usize;
        let value = |i| self.low + self.step * i as f64;
        (0..=count).map(|i| (value(i), format!("{:.decimals$}", value(i)))).collect()
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= rough * 0.999);
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let texts = |values: &[f64]| {
            let axis = Axis::over(values.iter().copied(), 0.0, 100.0);
            axis.ticks().into_iter().map(|t| t.1).collect::<Vec<_>>()
        };
        assert_eq!(texts(&[0.13, 0.47]), ["0.1", "0.2", "0.3", "0.4", "0.5"]);
        assert_eq!(texts(&[0.0, 4104.0]), ["0", "1000", "2000", "3000", "4000", "5000"]);
        assert_eq!(texts(&[3.0]).len(), 7, "2.4 to 3.6 by 0.2");
        assert_eq!(texts(&[]).first().map(String::as_str), Some("0.0"));
    }

    #[test]
    fn places_run_from_one_end_to_the_other() {
        let axis = Axis::over([0.0, 10.0].into_iter(), 400.0, 40.0);
        assert_eq!((axis.place(0.0), axis.place(10.0), axis.place(5.0)), (400.0, 40.0, 220.0));
    }
}
