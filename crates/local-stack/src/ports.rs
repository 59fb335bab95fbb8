//! Free TCP ports that stay free between being chosen and being listened on.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Result, bail};

/// `count` distinct ports on loopback that nobody listens on.
///
/// They lie below the range from which the system takes ports for outgoing connections, so that only another caller of
/// this function can take one in the meantime; that is made unlikely by choosing at random, and callers start again
/// with others if it happens.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let range = range();
    let size = u64::from(range.end - range.start);
    let mut held: Vec<TcpListener> = Vec::with_capacity(count);
    for _ in 0..10_000 {
        if held.len() == count {
            return held
                .iter()
                .map(|listener| Ok(listener.local_addr()?.port()))
                .collect();
        }
        let random = uuid::Uuid::new_v4().as_u64_pair().0;
        let port = range.start + (random % size) as u16;
        // Held until all are found, which also keeps them distinct.
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            held.push(listener);
        }
    }
    bail!(
        "found no {count} free ports on 127.0.0.1 between {} and {}",
        range.start,
        range.end
    )
}

fn range() -> std::ops::Range<u16> {
    let ephemeral_start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse::<u16>().ok())
        .unwrap_or(32_768);
    match ephemeral_start {
        30_000.. => 20_000..30_000,
        12_000.. => 10_240..ephemeral_start,
        // Somebody gave nearly everything to outgoing connections; there is no safe range left.
        _ => 20_000..30_000,
    }
}
