//! What is away is waited for: the mail server, its willingness, the database.

use local_stack::process::http_get;
use local_stack::testing::Process;
use local_stack::wait;

use crate::common::*;

/// Waits until `/readyz` says something.
async fn until_ready_says(process: &Process, part: &str) {
    let admin = process.admin().expect("listening");
    wait::until(&format!("/readyz says {part}"), LIMIT, || async {
        let (_, body) = http_get(admin, "/readyz").await?;
        Ok(body.contains(part).then_some(()))
    })
    .await
    .expect(part);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mail_server_is_waited_for() {
    let mut stage = Stage::new().await;
    stage.smtp.stop().await.expect("stopped");
    let mut replicas = [
        stage.process("one").start().await.expect("started"),
        stage.process("two").start().await.expect("started"),
    ];
    let mut mails = Vec::new();
    for number in 0..20 {
        let order = Order::new();
        mails.push(
            stage
                .tell_placed(&order, Some(&format!("u{number}@example.org")))
                .await
                .event_id,
        );
    }
    stage
        .until_count("SELECT count(*) FROM mails WHERE state = 'pending'", 20)
        .await;
    for replica in &replicas {
        until_ready_says(replica, "unreachable").await;
    }
    // Nothing is tried that cannot be sent.
    stage
        .until_count(
            "SELECT count(*) FROM mails WHERE state = 'pending' AND tries = 0",
            20,
        )
        .await;

    stage.smtp.restart().await.expect("started again");
    for mail in &mails {
        stage.until(*mail, "sent").await;
        stage.the_mail(*mail);
    }
    for replica in &mut replicas {
        replica.ready().await.expect("ready");
    }
    // Down amid work, which it may leave with connections that are no more.
    stage.smtp.kill().expect("killed");
    let order = Order::new();
    let late = stage.tell_placed(&order, Some("late@example.org")).await.event_id;
    stage.until(late, "pending").await;
    stage.smtp.restart().await.expect("started again");
    stage.until(late, "sent").await;
    stage.the_mail(late);
    for replica in &mut replicas {
        replica.stop().await.expect("stopped");
    }
    stage.is_right();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_is_refused_is_waited_for() {
    let stage = Stage::new().await;
    let order = Order::new();
    let placed = stage.tell_placed(&order, Some("ann@example.org")).await;
    let mut wrong = stage
        .process("wrong")
        .set("smtp.password", "wrong")
        .start()
        .await
        .expect("started");
    until_ready_says(&wrong, "login_refused (535)").await;
    stage.until(placed.event_id, "pending").await;
    assert!(stage.smtp.received().expect("mails").is_empty());
    wrong.stop().await.expect("stopped");

    // Nobody is let in who cannot show that he is the mail server.
    let mut untrusting = stage
        .process("untrusting")
        .set("smtp.ca_file", "")
        .start()
        .await
        .expect("started");
    until_ready_says(&untrusting, "mail server").await;
    assert!(stage.smtp.received().expect("mails").is_empty());
    untrusting.stop().await.expect("stopped");

    let mut right = stage.start("right").await;
    stage.until(placed.event_id, "sent").await;
    right.stop().await.expect("stopped");
}

/// The outcome of a mail that was taken is kept until it can be written.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_waited_for_with_a_mail_in_hand() {
    let stage = Stage::new().await;
    let mut replica = stage
        .process("replica")
        .set("smtp.data_timeout", "5s")
        .set("mails.lease", "20s")
        .set("mails.senders", "1")
        .start()
        .await
        .expect("started");
    // A writer of outbox rows who goes on for a while: the mail is taken, and "sent" cannot be written.
    let blocker = stage.database.connect().await.expect("connected");
    blocker
        .batch_execute("BEGIN; LOCK TABLE outbox IN EXCLUSIVE MODE")
        .await
        .expect("locked");
    let order = Order::new();
    let placed = stage.tell_placed(&order, Some("ann@example.org")).await;
    wait::until("the mail is taken", LIMIT, || async {
        Ok((!stage.taken(placed.event_id).is_empty()).then_some(()))
    })
    .await
    .expect("taken");
    let log = replica.log().to_owned();
    wait::until("it cannot be written", LIMIT, || async {
        let text = std::fs::read_to_string(&log)?;
        Ok(text
            .contains("cannot be written, and is tried again")
            .then_some(()))
    })
    .await
    .expect("logged");
    blocker.batch_execute("ROLLBACK").await.expect("released");
    stage.until(placed.event_id, "sent").await;
    stage.the_mail(placed.event_id);
    assert_eq!(stage.told_sent(placed.event_id).await, 1);
    replica.stop().await.expect("stopped");
    stage.is_right();
}
