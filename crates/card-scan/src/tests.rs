use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const KNOWN: &str = "4242424242424242";

#[track_caller]
fn found(scanner: &Scanner, bytes: &[u8]) -> Vec<What> {
    scanner
        .scan(bytes)
        .into_iter()
        .map(|finding| finding.what)
        .collect()
}

fn knowing() -> Scanner {
    Scanner::new([KNOWN, "378282246310005"])
}

fn utf16(text: &str, order: fn(u16) -> [u8; 2]) -> Vec<u8> {
    text.encode_utf16().flat_map(order).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn known_numbers_are_found_however_they_are_written() {
    let expected = What::KnownNumber { last_four: *b"4242" };
    for text in [
        KNOWN.to_owned(),
        "4242 4242 4242 4242".to_owned(),
        "4242-4242-4242-4242".to_owned(),
        "4242.4242.4242.4242".to_owned(),
        // Whatever stands around it.
        format!("id00{KNOWN}99x"),
        format!("paid by {KNOWN}, thanks"),
        hex(KNOWN.as_bytes()),
        hex(KNOWN.as_bytes()).to_uppercase(),
        format!("\\x0a{}00", hex(KNOWN.as_bytes())),
        STANDARD.encode(KNOWN),
        URL_SAFE_NO_PAD.encode(format!("{{\"number\":\"{KNOWN}\"}}")),
        STANDARD.encode(format!("xy{KNOWN}")),
        hex(STANDARD.encode(format!("a{KNOWN}")).as_bytes()),
        STANDARD.encode(hex(format!("a{KNOWN}").as_bytes())),
    ] {
        assert!(
            found(&knowing(), text.as_bytes()).contains(&expected),
            "not found in {text}"
        );
    }
    for order in [u16::to_le_bytes, u16::to_be_bytes] {
        let mut bytes = utf16(&format!("card {KNOWN}"), order);
        assert!(found(&knowing(), &bytes).contains(&expected));
        bytes.extend([0xff, 0xff]);
        assert!(found(&knowing(), &bytes).contains(&expected));
    }
}

#[test]
fn a_finding_says_where_and_shows_nothing() {
    let text = format!("abc {KNOWN}");
    let findings = knowing().scan(text.as_bytes());
    let [finding] = findings.as_slice() else {
        panic!("{findings:?}")
    };
    assert_eq!(
        finding.to_string(),
        "a card number that was used ending in 4242 at byte 4"
    );
    let encoded = format!("abc {}", hex(KNOWN.as_bytes()));
    let finding = &knowing().scan(encoded.as_bytes())[0];
    assert_eq!(
        finding.to_string(),
        "a card number that was used ending in 4242 in hexadecimal at byte 4"
    );
    let shown = format!("{:?}", Scanner::default().scan(b"cvv=917"));
    assert!(shown.contains("Cvv") && !shown.contains("917"), "{shown}");
}

#[test]
fn what_looks_like_a_card_number_is_found() {
    for (number, text) in [
        ("4539148803436467", "card=4539148803436467&x"),
        ("4539148803436467", "\"card-4539148803436467\""),
        ("378282246310005", "(378282246310005)"),
        ("6011000990139424", "6011000990139424"),
        ("5555555555554444", "\n\x105555555555554444\x10\x0c"),
        ("4222222222222", "4222222222222"),
        // In Protobuf, what follows may be anything.
        ("4539148803436467", "\n\x104539148803436467J\x02"),
        ("4539148803436467", "\n\x1045391488034364672\x02"),
        ("6304000000000000000", "n:6304000000000000000;"),
    ] {
        let last_four: [u8; 4] = number.as_bytes()[number.len() - 4..].try_into().expect("four");
        assert_eq!(
            found(&Scanner::default(), text.as_bytes()),
            [What::Number { last_four }],
            "{text}"
        );
        let encoded = STANDARD.encode(text);
        assert!(
            !Scanner::default().scan(encoded.as_bytes()).is_empty(),
            "{encoded}"
        );
        assert!(
            !Scanner::default()
                .scan(hex(text.as_bytes()).as_bytes())
                .is_empty()
        );
    }
}

#[test]
fn other_numbers_are_passed_over() {
    for text in [
        // A wrong check digit, too short, too long, and none that an issuer gives out.
        "4539148803436468",
        "424242424242",
        "42424242424242424242",
        "1763716356123456",
        "0.4242424242424242",
        "4242424242424242.5",
        "20260201000008",
        "x4539148803436467",
        "4539148803436467f",
        "00-0af7651916cd43dd8448eb211c80319c-4539148803436467-01",
        "{\"span_id\":\"4539148803436467\"}",
        "spanId=4539148803436467",
    ] {
        assert_eq!(found(&Scanner::default(), text.as_bytes()), [], "{text}");
    }
}

#[test]
fn cvvs_are_found_by_their_names() {
    for text in [
        "cvv=917",
        "CVC: 917",
        "\"cvv\":\"9170\"",
        "{\"security_code\": \"917\"}",
        "securityCode=917",
        "cardCvc: 917",
        "card[cvc]=917&card[number]=",
        "card%5Bcvc%5D=917",
        "cvv: Some(\"917\")",
        "cvv2 917",
        "verification-value=917",
        "\x0a\x03cvv\x12\x05\x0a\x03917",
        "\x0a\x03cvv\x12\x05\x0a\x039172J",
        "COPY public.cards (id, cvv, note) FROM stdin;\n1\t917\tx\n\\.\n",
    ] {
        assert_eq!(
            found(&Scanner::default(), text.as_bytes()),
            [What::Cvv],
            "{text:?}"
        );
        assert!(
            !Scanner::default()
                .scan(hex(text.as_bytes()).as_bytes())
                .is_empty()
        );
        let wide = utf16(&text.replace(char::is_control, " "), u16::to_le_bytes);
        if !text.contains('\n') {
            assert!(!Scanner::default().scan(&wide).is_empty(), "{text:?}");
        }
    }
    // shop.payment.v1.Card, without a number.
    let card = b"\x10\x0c\x18\xee\x0f\x22\x03917";
    assert_eq!(found(&Scanner::default(), card), [What::Cvv]);
}

#[test]
fn other_small_numbers_are_passed_over() {
    for text in [
        "917",
        "cvv",
        "cvv=91",
        "cvv=91712",
        "cvv is never stored, see rule 917",
        "incorrect_cvc, 402",
        "abcvv=917",
        "cvv917",
        "cvv/917",
        "cvc_check: pass 917",
        "COPY public.cards (id, brand) FROM stdin;\n917\tvisa\n\\.\n",
        "COPY public.cards (id, cvv) FROM stdin;\n1\t\\N\n\\.\n2\t917\n",
        "\x10\x0d\x18\x6e\x0f\x22\x03917",
    ] {
        assert_eq!(found(&Scanner::default(), text.as_bytes()), [], "{text:?}");
    }
}

/// Large samples of what machines write, without one false alarm.
#[test]
fn machines_are_not_taken_for_cards() {
    let mut rng = StdRng::seed_from_u64(4);
    let scanner = knowing();
    let mut text = String::new();
    for _ in 0..60_000 {
        let id = uuid::Builder::from_random_bytes(rng.random()).into_uuid();
        let (trace, span): (u128, u64) = (rng.random(), rng.random());
        let seconds = rng.random_range(1_000_000_000u64..2_000_000_000);
        let [millis, micros, nanos] = [1_000, 1_000_000, 1_000_000_000].map(|unit| {
            let fraction: u64 = rng.random_range(0..unit);
            seconds * unit + fraction
        });
        let (day, clock) = (rng.random_range(1..=28), rng.random_range(0..60));
        let fraction: u32 = rng.random_range(0..1_000_000);
        let share: f64 = rng.random();
        text.push_str(&format!(
            "{id} {} 00-{trace:032x}-{span:016x}-01 {millis} {micros} {nanos} {:X}/{:X} 2026-11-{day:02}T09:{clock:02}:{clock:02}.\
             {fraction:06}Z 2026-11-{day:02} 09:{clock:02}:{clock:02}.{fraction:06}+00 202611{day:02}09{clock:02}{clock:02} {share} \
             {{\"trace_id\":\"{trace:032x}\",\"span_id\":\"{span:016x}\"}} span_id={span:016x}\t{}\t{}\n",
            id.simple(),
            span >> 32,
            span as u32,
            rng.random_range(0..u32::MAX),
            hex(&trace.to_be_bytes()),
        ));
    }
    assert_eq!(scanner.scan(text.as_bytes()), []);
    let noise: Vec<u8> = (0..8_000_000).map(|_| rng.random()).collect();
    assert_eq!(scanner.scan(&noise), []);
    assert_eq!(scanner.scan(STANDARD.encode(&noise[..4_000_000]).as_bytes()), []);
}
