//! Rate and latency of what a leader publishes.

use std::time::Instant;

/// Latencies of one measurement that are kept: of more, the first ones.
const SAMPLES: usize = 10_000;

/// Counts between measurements.
#[derive(Debug)]
pub(crate) struct Meter {
    total: u64,
    /// When it was measured last, and the total then.
    since: (Instant, u64),
    /// Seconds.
    latencies: Vec<f64>,
}

/// What happened since the last measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    pub(crate) total: u64,
    /// Per second.
    pub(crate) rate: f64,
    /// Seconds.
    pub(crate) p50: Option<f64>,
    pub(crate) p99: Option<f64>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            total: 0,
            since: (Instant::now(), 0),
            latencies: Vec::new(),
        }
    }
}

impl Meter {
    pub(crate) fn published(&mut self, count: u64) {
        self.total += count;
    }

    /// `latency` in seconds.
    pub(crate) fn took(&mut self, latency: f64) {
        if self.latencies.len() < SAMPLES {
            self.latencies.push(latency);
        }
    }

    pub(crate) fn measure(&mut self) -> Measured {
        let (since, before) = std::mem::replace(&mut self.since, (Instant::now(), self.total));
        let seconds = since.elapsed().as_secs_f64().max(f64::EPSILON);
        self.latencies.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let last = self.latencies.len().checked_sub(1)?;
            // Within the bounds for shares up to one.
            let position = (last as f64 * share).round() as usize;
            Some(self.latencies[position])
        };
        let measured = Measured {
            total: self.total,
            rate: (self.total - before) as f64 / seconds,
            p50: at(0.5),
            p99: at(0.99),
        };
        self.latencies.clear();
        measured
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_came_since_the_last_measurement() {
        let mut meter = Meter::default();
        assert_eq!(meter.measure().p50, None);
        meter.published(3);
        for n in 1..=101 {
            meter.took(f64::from(n));
        }
        let measured = meter.measure();
        assert_eq!((measured.p50, measured.p99), (Some(51.0), Some(100.0)));
        assert_eq!(measured.total, 3);
        assert!(measured.rate > 0.0);
        assert_eq!(meter.measure().p99, None);
    }
}
