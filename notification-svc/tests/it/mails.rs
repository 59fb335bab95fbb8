//! The commands of operators.

use crate::common::*;

fn ok(answer: (bool, String, String)) -> String {
    let (success, out, err) = answer;
    assert!(success, "{out}{err}");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_settle_what_nobody_knows() {
    let stage = Stage::new().await;
    let mut replica = stage.start("replica").await;
    let mut told = Vec::new();
    for address in [
        "take-drop@example.org",
        "data-drop-once@example.org",
        "rcpt-550-once@example.org",
        "fine@example.org",
    ] {
        let order = Order::new();
        told.push(stage.tell_placed(&order, Some(address)).await.event_id);
    }
    let [dropped, lost, refused, fine] = told[..] else {
        unreachable!("four were told")
    };
    stage.until(dropped, "unknown").await;
    stage.until(lost, "unknown").await;
    stage.until(refused, "failed").await;
    stage.until(fine, "sent").await;

    let unsent = ok(stage.command(&["mails", "list"]));
    assert_eq!(unsent.lines().count(), 3, "{unsent}");
    let unknown = ok(stage.command(&["mails", "list", "--state", "unknown"]));
    assert_eq!(unknown.lines().count(), 2, "{unknown}");
    assert!(
        unknown.contains(&dropped.to_string()) && unknown.contains("no_answer"),
        "{unknown}"
    );
    let failed = ok(stage.command(&["mails", "list", "--state", "failed"]));
    assert!(
        failed.contains(&refused.to_string()) && failed.contains("recipient_refused"),
        "{failed}"
    );
    assert!(!unsent.contains("example.org"), "{unsent}");

    // Nothing without a reason, nor both, nor what does not fit.
    let settle = |id: uuid::Uuid, how: &[&str]| {
        let id = id.to_string();
        let args: Vec<&str> = ["mails", "settle", &id]
            .into_iter()
            .chain(how.iter().copied())
            .collect();
        stage.command(&args)
    };
    for how in [
        &["--sent"][..],
        &["--reason", "x"],
        &["--sent", "--resend", "--reason", "x"],
        &["--sent", "--reason", " "],
    ] {
        assert!(!settle(dropped, how).0, "{how:?}");
    }
    for (id, how) in [
        (fine, "--sent"),
        (fine, "--resend"),
        (refused, "--sent"),
        (uuid::Uuid::nil(), "--resend"),
    ] {
        let (success, _, error) = settle(id, &[how, "--reason", "x"]);
        assert!(!success, "{id} {how}");
        assert!(error.contains(&id.to_string()), "{error}");
    }
    stage.until(dropped, "unknown").await;

    let by = ["--by", "op"];
    ok(settle(
        dropped,
        &[&["--sent", "--reason", "seen in the mail server's log"], &by[..]].concat(),
    ));
    stage.until(dropped, "sent").await;
    assert_eq!(stage.told_sent(dropped).await, 1);
    assert_eq!(stage.taken(dropped).len(), 1);
    for id in [lost, refused] {
        ok(settle(
            id,
            &[&["--resend", "--reason", "not in its log"], &by[..]].concat(),
        ));
        stage.until(id, "sent").await;
        stage.the_mail(id);
        assert_eq!(stage.told_sent(id).await, 1);
    }
    let shown = ok(stage.command(&["mails", "show", &lost.to_string()]));
    assert!(
        shown.contains("resend by op, when it was unknown (no_answer): not in its log"),
        "{shown}"
    );
    let shown = ok(stage.command(&["mails", "show", &dropped.to_string(), "--json"]));
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(
        (&shown["state"], &shown["audit"][0]["action"]),
        (&"sent".into(), &"sent".into())
    );
    assert_eq!(ok(stage.command(&["mails", "list"])).trim(), "");
    replica.stop().await.expect("stopped");
    stage.is_right();
}
