//! What processes cost: CPU seconds and memory, from /proc.

use std::fs;

use anyhow::{Context, Result};

/// Ticks a second in /proc; Linux has it so on every machine for programs.
const TICKS: f64 = 100.0;

/// Seconds of CPU, user and system, of all threads that a process has and has had.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    Ok(stat(pid)?.own as f64 / TICKS)
}

/// The same of a process, of its children, and of those children that have ended: of PostgreSQL's server by its first
/// process.
pub(crate) fn family_cpu_seconds(pid: u32) -> Result<f64> {
    let parent = stat(pid)?;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .with_context(|| format!("cannot list the children of process {pid}"))?;
    // One that ends meanwhile is missed, or counted with those that have ended.
    let living: u64 = children
        .split_whitespace()
        .filter_map(|child| stat(child.parse().ok()?).ok())
        .map(|child| child.own)
        .sum();
    Ok((parent.own + parent.ended_children + living) as f64 / TICKS)
}

/// The most memory that a process has had resident, in MB (10^6 bytes).
pub(crate) fn peak_mb(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} has ended"))?;
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("process {pid} has no memory"))?;
    Ok(kib * 1024.0 / 1e6)
}

struct Stat {
    own: u64,
    ended_children: u64,
}

fn stat(pid: u32) -> Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))
        .with_context(|| format!("process {pid} has ended"))?;
    parse(&text).with_context(|| format!("/proc/{pid}/stat is not understood"))
}

/// `pid (name) state …`; the name may hold anything.
fn parse(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(") ")?;
    let ticks: Vec<u64> = rest
        .split(' ')
        .skip(11)
        .take(4)
        .map_while(|number| number.parse().ok())
        .collect();
    let [user, system, user_of_ended, system_of_ended] = ticks[..] else {
        return None;
    };
    Some(Stat {
        own: user + system,
        ended_children: user_of_ended + system_of_ended,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_past_any_name() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4 5 6 7 8 100 20 3 4 20 0 9 0";
        let stat = parse(text).expect("understood");
        assert_eq!((stat.own, stat.ended_children), (120, 7));
        assert!(parse("7 (a) S 1").is_none());
    }

    #[test]
    fn work_costs_time_and_memory() {
        let own = std::process::id();
        let before = cpu_seconds(own).expect("read");
        let mut sum = 0u64;
        let until = std::time::Instant::now() + std::time::Duration::from_millis(200);
        while std::time::Instant::now() < until {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_seconds(own).expect("read") > before);
        assert!(family_cpu_seconds(own).expect("read") > before);
        assert!(peak_mb(own).expect("read") > 1.0);
    }
}
