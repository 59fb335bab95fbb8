//! Card verification values. Three digits are nothing by themselves: what stands before them tells.

use crate::number::prefixed;

/// What they are called, in lower case and without what joins words.
const NAMES: [&str; 7] = [
    "cvv",
    "cvc",
    "cvn",
    "cvv2",
    "cvc2",
    "securitycode",
    "verificationvalue",
];
/// The longest of them, with what joins their words.
const LONGEST_NAME: usize = 20;
/// How many bytes there may be between a name and its value.
const WITHIN: usize = 16;
/// Words that stand between a name and its value where Rust shows it.
const WRAPPERS: [&str; 3] = ["some", "string", "value"];

/// Where they begin.
pub(crate) fn find(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let named = digits(bytes).filter(|(start, _)| is_named(&bytes[..*start]));
    let in_card = digits(bytes).filter(|(start, length)| ends_card(&bytes[..*start], *length));
    let in_column = columns(bytes);
    named.chain(in_card).map(|(start, _)| start).chain(in_column)
}

/// Three or four digits that stand alone.
fn digits(bytes: &[u8]) -> impl Iterator<Item = (usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        loop {
            let start = from + bytes[from..].iter().position(u8::is_ascii_digit)?;
            let end = bytes[start..].iter().position(|byte| !byte.is_ascii_digit());
            from = end.map_or(bytes.len(), |length| start + length);
            let alone = !bytes.get(from).is_some_and(u8::is_ascii_alphabetic);
            let length = prefixed(&bytes[..start], from - start).or(alone.then_some(from - start));
            if let Some(length) = length.filter(|length| is_value(&bytes[start..start + length])) {
                return Some((start, length));
            }
        }
    })
}

fn is_value(bytes: &[u8]) -> bool {
    (3..=4).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_digit)
}

/// Whether what stands before a value ends with the name of a CVV and something that says "is".
fn is_named(before: &[u8]) -> bool {
    let near = &before[before.len().saturating_sub(WITHIN)..];
    // Percent-encoded punctuation counts as such: card%5Bcvc%5D=123
    let mut rest = near;
    let mut joined = false;
    loop {
        if let [head @ .., b'%', high, low] = rest
            && high.is_ascii_hexdigit()
            && low.is_ascii_hexdigit()
        {
            rest = head;
            joined = true;
        } else if let Some((last, head)) = rest.split_last()
            && (b" \t\r\n:=\"'[](){}<>\\".contains(last) || *last < 0x20)
        {
            rest = head;
            joined = true;
        } else if !joined {
            return false;
        } else if name_before(&before[..before.len() - near.len() + rest.len()]) {
            return true;
        } else if let Some(wrapper) = WRAPPERS
            .iter()
            .find(|wrapper| ends_with_word(rest, wrapper.as_bytes()))
        {
            rest = &rest[..rest.len() - wrapper.len()];
        } else {
            return false;
        }
    }
}

fn ends_with_word(bytes: &[u8], word: &[u8]) -> bool {
    bytes.len() >= word.len() && bytes[bytes.len() - word.len()..].eq_ignore_ascii_case(word)
}

/// Whether these bytes end with a name.
fn name_before(bytes: &[u8]) -> bool {
    let near = &bytes[bytes.len().saturating_sub(LONGEST_NAME + 3)..];
    // Whole words only: in noise, three letters turn up soon. Names of several words are joined somehow.
    let is_joint = |byte: u8| [b'_', b'-', b' ', b'.'].contains(&byte);
    NAMES.iter().any(|name| {
        let mut letters = name.bytes().rev().peekable();
        let mut at = near.len();
        while let Some(letter) = letters.peek() {
            let Some(byte) = at.checked_sub(1).map(|before| near[before]) else {
                return false;
            };
            at -= 1;
            if byte.eq_ignore_ascii_case(letter) {
                letters.next();
            } else if !is_joint(byte) || at + 1 == near.len() {
                return false;
            }
        }
        match at.checked_sub(1).map(|before| near[before]) {
            None => true,
            // %5Bcvc%5D
            Some(_) if at >= 3 && near[at - 3] == b'%' => true,
            // cardCvc
            Some(before) if before.is_ascii_lowercase() => near[at].is_ascii_uppercase(),
            Some(before) => !before.is_ascii_alphanumeric(),
        }
    })
}

/// Whether what stands before a value is the rest of a `shop.payment.v1.Card`: month (field 2), year of this century (field 3), and
/// the tag and length of field 4.
fn ends_card(before: &[u8], length: usize) -> bool {
    let [.., 0x10, month, 0x18, low, high, 0x22, size] = before else {
        return false;
    };
    let year = u16::from(low & 0x7f) | u16::from(*high) << 7;
    (1..=12).contains(month)
        && low & 0x80 != 0
        && (2000..2100).contains(&year)
        && usize::from(*size) == length
}

/// Values in those columns of a dump whose names are names of CVVs.
fn columns(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let mut found = Vec::new();
    let mut watched: Vec<usize> = Vec::new();
    let mut start = 0;
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Some(columns) = copied_columns(line) {
            let named = columns.enumerate().filter(|(_, name)| name_before(name));
            watched = named.map(|(index, _)| index).collect();
        } else if line == b"\\." {
            watched.clear();
        } else if !watched.is_empty() {
            let mut at = start;
            for (index, value) in line.split(|byte| *byte == b'\t').enumerate() {
                if watched.contains(&index) && is_value(value) {
                    found.push(at);
                }
                at += value.len() + 1;
            }
        }
        start += line.len() + 1;
    }
    found.into_iter()
}

/// The columns of `COPY table (a, b) FROM stdin;`
fn copied_columns(line: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let columns = line.strip_prefix(b"COPY ")?.strip_suffix(b") FROM stdin;")?;
    let open = columns.iter().position(|byte| *byte == b'(')?;
    let names = columns[open + 1..].split(|byte| *byte == b',');
    Some(names.map(|name| name.trim_ascii()))
}
