//! Progress of long work: a bar with an estimate on a terminal, plain lines otherwise.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(30);

/// One long piece of work of a known length.
pub(super) struct Progress {
    what: &'static str,
    total: u64,
    /// Already done before this run; the estimate leaves it out.
    skipped: u64,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn new(what: &'static str, total: u64, done: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_position(done).with_prefix(what);
            let style = "{prefix} {bar:30} {pos}/{len} {elapsed} elapsed, {eta} left  {wide_msg}";
            bar.with_style(
                ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
            )
        });
        let now = Instant::now();
        Self { what, total, skipped: done, started: now, last_line: now, bar }
    }

    /// `done` of the total, with a word about how it goes.
    pub(super) fn set(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_string());
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let (what, total) = (self.what, self.total);
            let left = self.left(done).map_or(String::new(), |s| format!(", about {} min left", s / 60 + 1));
            tracing::info!("{what} {done}/{total}{left}  {message}");
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn left(&self, done: u64) -> Option<u64> {
        let fresh = done.checked_sub(self.skipped).filter(|&f| f > 0)?;
        let left = self.total.saturating_sub(done);
        Some((self.started.elapsed().as_secs_f64() / fresh as f64 * left as f64) as u64)
    }
}
