//! Card numbers.

use std::collections::{BTreeMap, HashSet};

use crate::What;

const LENGTHS: std::ops::RangeInclusive<usize> = 13..=19;
/// What people put between groups of digits.
const SEPARATORS: [u8; 3] = [b' ', b'-', b'.'];
/// How far before a number its name is looked for.
const NAME_WITHIN: usize = 24;

/// Known numbers, also with one separator between any two digits, and where they begin.
pub(crate) fn known(bytes: &[u8], known: &BTreeMap<usize, HashSet<u64>>) -> Vec<(usize, What)> {
    let mut found = Vec::new();
    if known.is_empty() {
        return found;
    }
    // Where the digits are since the last byte that is neither a digit nor a single separator.
    let mut places: Vec<usize> = Vec::new();
    for (at, byte) in bytes.iter().enumerate() {
        if !byte.is_ascii_digit() {
            let single = SEPARATORS.contains(byte) && at > 0 && bytes[at - 1].is_ascii_digit();
            if !single {
                places.clear();
            }
            continue;
        }
        places.push(at);
        for (length, numbers) in known {
            let Some(first) = places.len().checked_sub(*length) else {
                continue;
            };
            let window = &places[first..];
            let number = window.iter().try_fold(0u64, |number, at| {
                number.checked_mul(10)?.checked_add(u64::from(bytes[*at] - b'0'))
            });
            if let Some(last_four) = window.last_chunk::<4>()
                && number.is_some_and(|number| numbers.contains(&number))
            {
                let last_four = last_four.map(|at| bytes[at]);
                found.push((window[0], What::KnownNumber { last_four }));
            }
        }
    }
    found
}

/// What looks like a card number, and where it begins.
pub(crate) fn generic(bytes: &[u8]) -> impl Iterator<Item = (usize, What)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        loop {
            let start = from + bytes[from..].iter().position(u8::is_ascii_digit)?;
            let length = bytes[start..].iter().position(|byte| !byte.is_ascii_digit());
            from = length.map_or(bytes.len(), |length| start + length);
            let alone = stands_alone(bytes, start, from).then_some(from - start);
            let length = prefixed(&bytes[..start], from - start).or(alone);
            let digits = &bytes[start..start + length.unwrap_or(0)];
            if let Some(last_four) = digits.last_chunk::<4>().filter(|_| looks_like_a_card(digits)) {
                let last_four = *last_four;
                return Some((start, What::Number { last_four }));
            }
        }
    })
}

fn looks_like_a_card(digits: &[u8]) -> bool {
    LENGTHS.contains(&digits.len())
        && (b'2'..=b'6').contains(&digits[0])
        && luhn(digits)
        && !is_timestamp(digits)
}

/// How many of `available` digits belong together by the length that stands before them, as in Protobuf: what follows may be a digit
/// or a letter by accident.
pub(crate) fn prefixed(before: &[u8], available: usize) -> Option<usize> {
    let length = usize::from(*before.last()?);
    (length <= available).then_some(length)
}

fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .zip([1, 2].into_iter().cycle())
        .map(|(digit, weight)| {
            let product = u32::from(digit - b'0') * weight;
            product / 10 + product % 10
        })
        .sum();
    sum.is_multiple_of(10)
}

/// `YYYYMMDDhhmmss` of this century, perhaps with a fraction: versions of migrations, names of files. No issuer has such numbers.
fn is_timestamp(digits: &[u8]) -> bool {
    let part = |range: std::ops::Range<usize>| {
        digits[range]
            .iter()
            .fold(0u32, |value, digit| value * 10 + u32::from(digit - b'0'))
    };
    digits.len() >= 14
        && part(0..2) == 20
        && (1..=12).contains(&part(4..6))
        && (1..=31).contains(&part(6..8))
        && part(8..10) < 24
        && part(10..12) < 60
        && part(12..14) <= 60
}

/// Whether these digits are a word of their own, and not a part of what machines write.
fn stands_alone(bytes: &[u8], start: usize, end: usize) -> bool {
    let before = &bytes[..start];
    let after = &bytes[end..];
    let next_to = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    if next_to(before.last()) || next_to(after.first()) {
        return false;
    }
    // 0.4242424242424242
    let is_point = |byte: &u8| [b'.', b','].contains(byte);
    if let [.., digit, point] = before
        && digit.is_ascii_digit()
        && is_point(point)
    {
        return false;
    }
    if let [point, digit, ..] = after
        && digit.is_ascii_digit()
        && *point == b'.'
    {
        return false;
    }
    // A part of a UUID or of a traceparent: joined to other hexadecimal digits.
    let is_joint = |byte: &u8| [b'-', b'_'].contains(byte);
    let is_hex = |part: Vec<&u8>| !part.is_empty() && part.iter().all(|byte| byte.is_ascii_hexdigit());
    let is_word = |byte: &&u8| byte.is_ascii_alphanumeric();
    if before.last().is_some_and(is_joint)
        && is_hex(before.iter().rev().skip(1).take_while(is_word).collect())
    {
        return false;
    }
    if after.first().is_some_and(is_joint) && is_hex(after.iter().skip(1).take_while(is_word).collect()) {
        return false;
    }
    !is_named_as_id(before)
}

/// Whether the last word before it says that it is the id of a trace or of a span: those are hexadecimal, and now and then have no
/// letter among their digits.
fn is_named_as_id(before: &[u8]) -> bool {
    let near = &before[before.len().saturating_sub(NAME_WITHIN)..];
    let name = near
        .iter()
        .rev()
        .skip_while(|byte| !byte.is_ascii_alphanumeric())
        .take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_')
        .map(u8::to_ascii_lowercase);
    // Read from its end.
    let name: Vec<u8> = name.filter(|byte| *byte != b'_').collect();
    ["spanid", "traceid"]
        .iter()
        .any(|id| name.iter().rev().eq(id.as_bytes()))
}
