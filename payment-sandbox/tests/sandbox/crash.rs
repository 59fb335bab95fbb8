//! `kill -9` while it works.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use futures::future::join_all;
use local_stack::cards;
use local_stack::wait;

use crate::stage::*;

const CLIENTS: usize = 12;
/// How many answers each life has to give before it is killed.
const ANSWERS: usize = 150;
const LIVES: usize = 4;

/// What the clients were told.
#[derive(Default)]
struct Told {
    /// Every intent, and whether its confirmation and its refund were answered.
    intents: BTreeMap<String, (bool, bool)>,
    answers: usize,
}

/// Pays and refunds until the sandbox is gone.
async fn work(client: &Client, method: &str, told: &Mutex<Told>) {
    loop {
        let Ok(made) = client.try_post("/v1/payment_intents", "", &charge(method)).await else {
            return;
        };
        let intent = id(made.ok());
        told.lock()
            .unwrap()
            .intents
            .insert(intent.clone(), (false, false));
        let key = format!("confirm {intent}");
        let Ok(confirmed) = client.try_post(&confirm(&intent), &key, &[]).await else {
            return;
        };
        confirmed.ok();
        told.lock().unwrap().intents.insert(intent.clone(), (true, false));
        let (key, refund) = (format!("refund {intent}"), [("payment_intent", intent.as_str())]);
        let Ok(refunded) = client.try_post("/v1/refunds", &key, &refund).await else {
            return;
        };
        refunded.ok();
        let mut told = told.lock().unwrap();
        told.intents.insert(intent, (true, true));
        told.answers += 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_answered_is_lost_and_nothing_is_done_twice() {
    let mut stage = Stage::start().await;
    let client = stage.client.clone();
    let method = client.method(cards::VISA).await;
    let told = Mutex::new(Told::default());
    for life in 1..=LIVES {
        let clients = join_all((0..CLIENTS).map(|_| work(&client, &method, &told)));
        let kill = async {
            wait::until("enough was answered", LIMIT, || async {
                Ok((told.lock().unwrap().answers >= life * ANSWERS).then_some(()))
            })
            .await
            .unwrap();
            stage.process.kill().unwrap();
        };
        tokio::join!(clients, kill);
        stage.process.start().await.unwrap();

        let (charged, refunded) = ledger(&client).await;
        for (intent, (confirmed, was_refunded)) in &told.lock().unwrap().intents {
            assert!(
                !confirmed || charged.contains(intent),
                "life {life}: lost the charge of {intent}"
            );
            assert!(
                !was_refunded || refunded.contains(intent),
                "life {life}: lost the refund of {intent}"
            );
        }
    }
    // Whoever got no answer asks again, with the same keys.
    let intents: Vec<String> = told.lock().unwrap().intents.keys().cloned().collect();
    let unanswered = told
        .lock()
        .unwrap()
        .intents
        .values()
        .filter(|(_, refunded)| !refunded)
        .count();
    assert!(unanswered > 0, "nothing was cut off");
    for intent in &intents {
        let confirmed = client.confirm(intent, &format!("confirm {intent}")).await;
        assert_eq!(confirmed.ok()["status"], "succeeded");
        let refund = [("payment_intent", intent.as_str())];
        client
            .post("/v1/refunds", &format!("refund {intent}"), &refund)
            .await
            .ok();
    }
    let (charged, refunded) = ledger(&client).await;
    assert_eq!((charged.len(), refunded.len()), (intents.len(), intents.len()));
}

/// The intents that were charged and refunded; none twice.
async fn ledger(client: &Client) -> (BTreeSet<String>, BTreeSet<String>) {
    let ledger = client.ledger().await;
    let intents = |name: &str| {
        let mut intents = BTreeSet::new();
        for entry in ledger[name].as_array().unwrap() {
            let intent = entry["payment_intent"].as_str().unwrap().to_owned();
            assert!(intents.insert(intent), "twice among the {name}: {entry}");
        }
        intents
    };
    (intents("charges"), intents("refunds"))
}
