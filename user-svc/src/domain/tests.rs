//! Given a history, when a command comes, then these events follow, or this refusal.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::*;

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range")
}

fn id() -> UserId {
    UserId(Uuid::from_u128(1))
}

fn email(text: &str) -> Email {
    Email::parse(text).expect("an address")
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

fn details() -> Details {
    Details {
        email: email("ann@example.org"),
        first_name: name("Ann"),
        last_name: name("Lee"),
    }
}

fn create() -> Command {
    Command::Create {
        id: id(),
        details: details(),
    }
}

fn created() -> Event {
    Event::Created {
        id: id(),
        details: details(),
        at: at(0),
    }
}

fn updated(details: Details) -> Event {
    Event::Updated { details, at: at(1) }
}

#[track_caller]
fn check(given: &[Event], command: Command, expect: Result<Vec<Event>, Refusal>) {
    let state = rebuild(given).expect("a sound history");
    let now = at(i64::try_from(given.len()).expect("few"));
    assert_eq!(decide(state.as_ref(), command.clone(), now), expect);
    if let Ok(events) = expect {
        let change = Change::make(state, command, now).expect("decided");
        let all: Vec<Event> = given.iter().chain(&events).cloned().collect();
        assert_eq!(Some(change.user().clone()), rebuild(&all).expect("sound"));
        assert_eq!(change.version_before(), given.len() as i64);
        assert_eq!(change.events(), events);
    }
}

#[test]
fn users_are_created_once() {
    check(&[], create(), Ok(vec![created()]));
    check(&[created()], create(), Err(Refusal::Exists));
}

#[test]
fn an_update_changes_what_is_given() {
    let update = |email, first_name, last_name| {
        Command::Update(Update {
            email,
            first_name,
            last_name,
        })
    };
    let given = [created()];
    check(
        &given,
        update(Some(email("lee@example.org")), None, None),
        Ok(vec![updated(Details {
            email: email("lee@example.org"),
            ..details()
        })]),
    );
    check(
        &given,
        update(None, Some(name("Anna")), Some(name("Li"))),
        Ok(vec![updated(Details {
            first_name: name("Anna"),
            last_name: name("Li"),
            ..details()
        })]),
    );
    // The same address in another spelling is a change to his liking.
    check(
        &given,
        update(Some(email("Ann@example.org")), None, None),
        Ok(vec![updated(Details {
            email: email("Ann@example.org"),
            ..details()
        })]),
    );
    for nothing in [
        update(None, None, None),
        update(Some(email("ann@EXAMPLE.org")), Some(name("Ann")), None),
    ] {
        check(&given, nothing, Ok(vec![]));
    }
    check(&[], update(None, None, None), Err(Refusal::Unknown));
}

#[test]
fn histories_that_cannot_be_are_refused() {
    assert_eq!(rebuild(&[]), Ok(None));
    assert_eq!(rebuild(&[updated(details())]), Err(ApplyError::UpdatedFirst));
    assert_eq!(rebuild(&[created(), created()]), Err(ApplyError::CreatedTwice));
}
