//! Times as headers have them, where millions are written.

use chrono::{DateTime, SecondsFormat};

/// Calls `put` with RFC 3339 in UTC with six digits of the second, as chrono writes it and [`Envelope::write`](crate::Envelope::write)
/// does; `micros` are microseconds since the Unix epoch. The date is computed as in Howard Hinnant's "chrono-Compatible Low-Level
/// Date Algorithms" (`civil_from_days`).
pub fn rfc3339(micros: i64, put: impl FnOnce(&[u8])) {
    const DAY: i64 = 86_400_000_000;
    let (days, of_day) = (micros.div_euclid(DAY), micros.rem_euclid(DAY));
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    if !(0..=9_999).contains(&year) {
        let time = DateTime::from_timestamp_micros(micros).unwrap_or_default();
        return put(time.to_rfc3339_opts(SecondsFormat::Micros, true).as_bytes());
    }
    let mut text = *b"0000-00-00T00:00:00.000000Z";
    digits(&mut text[0..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], of_day / 3_600_000_000);
    digits(&mut text[14..16], of_day / 60_000_000 % 60);
    digits(&mut text[17..19], of_day / 1_000_000 % 60);
    digits(&mut text[20..26], of_day % 1_000_000);
    put(&text);
}

fn digits(text: &mut [u8], mut number: i64) {
    for place in text.iter_mut().rev() {
        // One digit.
        *place = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;
    use proptest::prelude::*;

    use super::*;

    fn agrees(micros: i64) -> bool {
        let time = DateTime::from_timestamp_micros(micros).expect("within chrono's range");
        let mut same = false;
        rfc3339(micros, |text| {
            same = text == time.to_rfc3339_opts(SecondsFormat::Micros, true).as_bytes();
        });
        same
    }

    proptest! {
        #[test]
        fn times_are_written_as_chrono_writes_them(micros in -80_000_000_000_000_000i64..400_000_000_000_000_000) {
            prop_assert!(agrees(micros), "{}", micros);
        }
    }

    #[test]
    fn the_ends_of_days_months_and_years_are_right() {
        for text in [
            "1970-01-01",
            "2000-02-29",
            "2000-03-01",
            "2023-12-31",
            "2024-02-29",
            "1900-03-01",
            "0000-01-01",
            "9999-12-31",
        ] {
            let start: DateTime<Utc> = format!("{text}T00:00:00Z").parse().expect("a time");
            for micros in [0, 1, 86_399_999_999, -1] {
                assert!(agrees(start.timestamp_micros() + micros), "{text} {micros}");
            }
        }
        assert!(agrees(
            "+10000-01-01T00:00:00Z"
                .parse::<DateTime<Utc>>()
                .expect("a time")
                .timestamp_micros()
        ));
    }
}
