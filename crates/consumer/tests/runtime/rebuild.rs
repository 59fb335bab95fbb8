//! A projection built anew beside the live one.

use local_stack::wait;
use tokio_util::sync::CancellationToken;

use crate::stage::{LIMIT, Stage, Transaction, nothing};

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_where_partitions_end_in_what_is_never_delivered() {
    let stage = Stage::new(4).await;
    // A record, a commit; records, an abort; an abort alone; nothing at all.
    stage.transaction(0, &["a", "b"], Transaction::Committed).await;
    stage.transaction(1, &["c"], Transaction::Committed).await;
    stage.transaction(1, &["lost"], Transaction::Aborted).await;
    stage.transaction(2, &["lost"], Transaction::Aborted).await;
    let instance = stage.start("a", nothing());
    // Markers have offsets too.
    stage.all_committed(3 + 4 + 2).await;
    wait::until("the lag to be told as none", LIMIT, || async {
        let lag = instance.metric("consumer_lag_records", "");
        Ok((instance.samples("consumer_lag_records") == 3 && lag == 0.0).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(instance.metric("consumer_messages_total", ""), 3.0);

    let rebuild = stage.rebuild(nothing());
    let shutdown = CancellationToken::new();
    let rebuilt = tokio::time::timeout(LIMIT, rebuild.run(|_| {}, &shutdown));
    assert_eq!(rebuilt.await.unwrap().unwrap().generation, 2);
    let mut effects = stage.effects().await.unwrap();
    effects.sort_unstable();
    assert_eq!(effects, ["a", "b", "c"].map(|entity| (entity.to_owned(), 1)));
    assert_eq!(
        stage
            .number("SELECT count(*) FROM effects WHERE instance <> 'rebuild'")
            .await,
        0
    );
    instance.stop().await;
}
