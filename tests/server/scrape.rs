//! What `/metrics` said at one moment.

pub(crate) struct Scrape(pub(crate) String);

impl Scrape {
    /// The sum of all samples of this name that have these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let samples = self.0.lines().filter(|l| !l.starts_with('#'));
        let wanted = samples.filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (own, given) = series.split_once('{').unwrap_or((series, ""));
            let has = |(label, value): &(&str, &str)| given.contains(&format!("{label}=\"{value}\""));
            (own == name && labels.iter().all(has)).then(|| value.parse::<f64>().unwrap())
        });
        wanted.sum()
    }

    /// Sequences that run or wait, and the used share of the key-value pool.
    pub(crate) fn load(&self) -> (f64, f64, f64) {
        let (running, waiting) = ("lonas_requests_running", "lonas_requests_waiting");
        (self.sum(running, &[]), self.sum(waiting, &[]), self.sum("lonas_kv_cache_usage_ratio", &[]))
    }

    /// Requests that the engine has taken.
    pub(crate) fn accepted(&self) -> f64 {
        self.sum("lonas_subnetwork_selected_total", &[])
    }

    pub(crate) fn ended(&self, outcome: &str) -> f64 {
        self.sum("lonas_requests_total", &[("outcome", outcome)])
    }
}
