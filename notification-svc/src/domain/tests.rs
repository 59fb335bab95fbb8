use std::time::Duration;

use super::*;

const RETRY: Retry = Retry {
    first: Duration::from_secs(10),
    longest: Duration::from_secs(60),
};

#[track_caller]
fn check(outcome: Outcome, tries: i32, expect: Next) {
    assert_eq!(RETRY.next(outcome, tries), expect);
}

#[test]
fn only_what_was_surely_not_taken_is_tried_again() {
    use Trouble::{NoAnswer, RecipientDeferred, RecipientRefused, SenderRefused};
    let again = |seconds, tries, trouble| Next::Again {
        after: Duration::from_secs(seconds),
        tries,
        trouble,
    };
    check(Outcome::Taken, 3, Next::Sent);
    check(
        Outcome::Deferred(RecipientDeferred),
        0,
        again(10, 1, RecipientDeferred),
    );
    check(
        Outcome::Deferred(RecipientDeferred),
        1,
        again(20, 2, RecipientDeferred),
    );
    check(
        Outcome::Deferred(RecipientDeferred),
        i32::MAX,
        again(60, i32::MAX, RecipientDeferred),
    );
    check(Outcome::ServerAway(SenderRefused), 2, again(0, 2, SenderRefused));
    check(
        Outcome::Refused(RecipientRefused),
        0,
        Next::Failed(RecipientRefused),
    );
    check(Outcome::Unknown(NoAnswer), 0, Next::Unknown(NoAnswer));
}

#[test]
fn a_connection_in_doubt_is_not_used_again() {
    for (outcome, leaves) in [
        (Outcome::Taken, true),
        (Outcome::Refused(Trouble::RecipientRefused), true),
        (Outcome::Deferred(Trouble::MessageDeferred), true),
        (Outcome::Deferred(Trouble::ConnectionLost), false),
        (Outcome::Deferred(Trouble::Timeout), false),
        (Outcome::ServerAway(Trouble::Interrupted), false),
        (Outcome::Unknown(Trouble::NoAnswer), false),
    ] {
        assert_eq!(outcome.leaves_connection(), leaves, "{outcome:?}");
    }
}

#[test]
fn nothing_personal_shows_itself() {
    let news = News::Address {
        user_id: UserId(uuid::Uuid::nil()),
        email: Email::parse("ann@example.org").expect("valid"),
        first_name: Name::parse("Ann").expect("valid"),
    };
    let text = format!("{news:?}");
    assert!(!text.contains("ann@") && !text.contains("\"Ann"), "{text}");
    for text in ["", "a\nb@example.org", "ab"] {
        assert_eq!(Email::parse(text), None, "{text:?}");
    }
}
