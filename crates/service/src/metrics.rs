//! The metrics of a process: a registry with `build_info` and what the kernel knows about the process.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, IntGauge, IntGaugeVec, Opts, Registry};

/// A registry that has `build_info{service, version}` and the metrics `process_…`.
///
/// # Errors
/// Never in practice: only when a name is registered twice.
pub fn registry(service: &str, version: &str) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    let build = IntGaugeVec::new(
        Opts::new("build_info", "1 for the version that runs."),
        &["service", "version"],
    )?;
    build.with_label_values(&[service, version]).set(1);
    registry.register(Box::new(build))?;
    registry.register(Box::new(Process::new()?))?;
    Ok(registry)
}

/// Reads `/proc/self` at each scrape; shows nothing where there is none.
struct Process {
    cpu: Counter,
    resident: IntGauge,
    open_files: IntGauge,
    start: Gauge,
}

/// Ticks of `/proc/self/stat` in a second: `USER_HZ`, 100 on every architecture that Linux runs on today.
const TICKS: f64 = 100.0;

impl Process {
    fn new() -> prometheus::Result<Self> {
        let start = Gauge::new(
            "process_start_time_seconds",
            "When the process started, Unix time.",
        )?;
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        start.set(now.as_secs_f64());
        Ok(Self {
            cpu: Counter::new("process_cpu_seconds_total", "User and system time.")?,
            resident: IntGauge::new("process_resident_memory_bytes", "Memory in RAM.")?,
            open_files: IntGauge::new("process_open_fds", "Open file descriptors.")?,
            start,
        })
    }

    fn read(&self) -> Option<()> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // After the name, which is in parentheses and may hold anything, utime and stime are the 12th and 13th fields.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
        self.cpu.inc_by((ticks / TICKS - self.cpu.get()).max(0.0));
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        self.resident
            .set(resident.trim().trim_end_matches(" kB").parse::<i64>().ok()? * 1024);
        self.open_files
            .set(i64::try_from(std::fs::read_dir("/proc/self/fd").ok()?.count()).ok()?);
        Some(())
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        [
            self.cpu.desc(),
            self.resident.desc(),
            self.open_files.desc(),
            self.start.desc(),
        ]
        .concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let _ = self.read();
        [
            self.cpu.collect(),
            self.resident.collect(),
            self.open_files.collect(),
            self.start.collect(),
        ]
        .concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_knows_its_build_and_its_process() {
        let registry = registry("x-svc", "1.2.3").expect("fresh");
        let text = prometheus::TextEncoder::new()
            .encode_to_string(&registry.gather())
            .expect("text");
        assert!(
            text.contains(r#"build_info{service="x-svc",version="1.2.3"} 1"#),
            "{text}"
        );
        assert!(!text.contains("process_resident_memory_bytes 0\n"), "{text}");
        assert!(text.contains("process_cpu_seconds_total"), "{text}");
    }
}
