//! Text that is written in something else.

use std::fmt;

/// The shortest card number has so many digits.
const SHORTEST: usize = 13;
/// A CVV with its name is shorter: `cvv=123`.
const SHORTEST_TEXT: usize = 7;

/// What text can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Encoding {
    /// Of either byte order.
    Utf16,
    Hex,
    /// Of either alphabet.
    Base64,
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Utf16 => "UTF-16",
            Self::Hex => "hexadecimal",
            Self::Base64 => "Base64",
        })
    }
}

/// Calls `see` with every stretch of bytes that may be encoded text: where it begins, and what it decodes to.
pub(crate) fn decoded(bytes: &[u8], mut see: impl FnMut(Encoding, usize, &[u8])) {
    let mut see = |encoding, at, decoded: &[u8]| {
        if is_worth_it(decoded) {
            see(encoding, at, decoded);
        }
    };
    let mut buffer = Vec::new();
    utf16(bytes, &mut buffer, &mut see);
    // Where the text begins within a stretch is not known, so every alignment is tried.
    for (start, run) in runs(bytes, |byte| byte.is_ascii_hexdigit()) {
        for alignment in 0..2 {
            if run.len() >= alignment + 2 * SHORTEST_TEXT {
                from_hex(&run[alignment..], &mut buffer);
                see(Encoding::Hex, start, &buffer);
            }
        }
    }
    for (start, run) in runs(bytes, |byte| sextet(byte).is_some()) {
        for alignment in 0..4 {
            if run.len() >= alignment + (SHORTEST * 4).div_ceil(3) {
                from_base64(&run[alignment..], &mut buffer);
                see(Encoding::Base64, start, &buffer);
            }
        }
    }
}

/// Whether there can be anything in it: three digits in a row, if only in UTF-16, or a stretch that may be encoded itself. Most of what
/// is decoded here was never encoded, and is noise.
fn is_worth_it(bytes: &[u8]) -> bool {
    let (mut digits, mut encoded) = (0, 0);
    bytes.iter().any(|byte| {
        digits = match byte {
            b'0'..=b'9' => digits + 1,
            0 => digits,
            _ => 0,
        };
        encoded = if sextet(*byte).is_some() { encoded + 1 } else { 0 };
        digits == 3 || encoded == 2 * SHORTEST_TEXT
    })
}

/// The stretches of bytes that belong together, and where they begin.
fn runs(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> impl Iterator<Item = (usize, &[u8])> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + bytes[from..].iter().position(|byte| belongs(*byte))?;
        let length = bytes[start..].iter().position(|byte| !belongs(*byte));
        from = length.map_or(bytes.len(), |length| start + length);
        Some((start, &bytes[start..from]))
    })
}

/// Printable ASCII with a zero between every two.
fn utf16(bytes: &[u8], buffer: &mut Vec<u8>, see: &mut impl FnMut(Encoding, usize, &[u8])) {
    let printable = |at: usize| bytes.get(at).is_some_and(|byte| (0x20..0x7f).contains(byte));
    let mut at = 0;
    while at < bytes.len() {
        buffer.clear();
        let start = at;
        while printable(at) && bytes.get(at + 1).is_none_or(|byte| *byte == 0) {
            buffer.push(bytes[at]);
            at += 2;
        }
        // The last one of the big-endian order has no zero behind it.
        if at > start && printable(at) {
            buffer.push(bytes[at]);
        }
        if buffer.len() >= SHORTEST_TEXT {
            see(Encoding::Utf16, start, buffer);
        }
        at = at.max(start + 1);
    }
}

fn from_hex(run: &[u8], buffer: &mut Vec<u8>) {
    let nibble = |byte: u8| match byte {
        b'0'..=b'9' => byte - b'0',
        _ => byte.to_ascii_lowercase() - b'a' + 10,
    };
    buffer.clear();
    buffer.extend(
        run.chunks_exact(2)
            .map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])),
    );
}

fn sextet(byte: u8) -> Option<u8> {
    Some(match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' | b'-' => 62,
        b'/' | b'_' => 63,
        _ => return None,
    })
}

fn from_base64(run: &[u8], buffer: &mut Vec<u8>) {
    buffer.clear();
    for group in run.chunks(4) {
        let bits = group.iter().fold(0u32, |bits, byte| {
            (bits << 6) | u32::from(sextet(*byte).unwrap_or_default())
        });
        // What is missing in the last group is padding.
        let bits = bits << (6 * (4 - group.len()));
        let bytes = bits.to_be_bytes();
        buffer.extend_from_slice(&bytes[1..group.len().max(1)]);
    }
}
