//! GetSalesSummary: what may be asked, and what it costs.

use chrono::TimeDelta;
use contracts::shop::analytics::events::v1::WindowSize;
use contracts::shop::analytics::v1::GetSalesSummaryRequest;
use local_stack::wait;

use crate::shop::{Story, at, figures_of, publish};
use crate::stage::{LIMIT, Stage, assert_bad_fields, span};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_has_bounds() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let good = span(WindowSize::Minute, at(0), at(60 * 1_500));
    assert_eq!(replica.summary(good.clone()).await.unwrap().windows, []);
    let total = replica.summary(good.clone()).await.unwrap().total.unwrap();
    assert_eq!((total.window_size, total.window_start), (0, good.start));
    assert_eq!((total.figures.len(), total.conversion), (0, 0.0));
    for (request, fields) in [
        (
            GetSalesSummaryRequest::default(),
            &["window_size", "start", "end"][..],
        ),
        (
            GetSalesSummaryRequest {
                window_size: 4,
                ..good.clone()
            },
            &["window_size"],
        ),
        (span(WindowSize::Minute, at(0), at(60 * 1_500 + 1)), &["end"]),
        (span(WindowSize::Day, at(0), at(0)), &["end"]),
        (span(WindowSize::Day, at(1), at(0)), &["end"]),
        (span(WindowSize::Day, at(-3_000_000_000), at(0)), &["start"]),
        (
            GetSalesSummaryRequest {
                currency_code: "eur".to_owned(),
                ..good
            },
            &["currency_code"],
        ),
    ] {
        assert_bad_fields(replica.summary(request).await, fields);
    }
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_span_has_the_windows_that_begin_in_it_in_the_currency_asked_for() {
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    let stories: Vec<Story> = (0..60).map(Story::numbered).collect();
    let published = publish(&stage, &stories).await;
    stage.applied(published).await;
    let all = figures_of(&stories, WindowSize::Minute);
    let start = |number: usize| contracts::wire::time(all[number].window_start.as_ref()).unwrap();
    // The start is included and the end is not.
    let some = span(WindowSize::Minute, start(3), start(7));
    assert_eq!(replica.summary(some).await.unwrap().windows, all[3..7]);
    let between = span(
        WindowSize::Minute,
        start(3) + TimeDelta::milliseconds(1),
        start(7) + TimeDelta::milliseconds(1),
    );
    assert_eq!(replica.summary(between).await.unwrap().windows, all[4..8]);
    let only = GetSalesSummaryRequest {
        currency_code: "JPY".to_owned(),
        ..span(WindowSize::Hour, at(-3600), at(7200))
    };
    let answer = replica.summary(only).await.unwrap();
    let yen: Vec<Story> = stories
        .into_iter()
        .filter(|story| story.currency == "JPY")
        .collect();
    assert_eq!(answer.windows, figures_of(&yen, WindowSize::Hour));
    let total = answer.total.unwrap();
    assert_eq!(total.figures[0].orders_placed, yen.len() as i64);
    assert!(total.figures[0].best_sellers.is_empty());
    replica.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_best_of_many_products_are_found_without_reading_the_others() {
    const WINDOWS: i64 = 1_500;
    let stage = Stage::new().await;
    let replica = stage.replica().await;
    stage
        .run(
            "INSERT INTO sales_figures \
             SELECT 1, timestamptz '2026-03-01 00:00Z' + n * interval '1 minute', c, 100, 100, 0, 100, 0 \
             FROM generate_series(0, 2999) n, unnest(ARRAY['EUR', 'JPY']) c; \
             INSERT INTO sales_products \
             SELECT 1, timestamptz '2026-03-01 00:00Z' + n * interval '1 minute', c, \
                    ('00000000-0000-0000-0000-' || lpad(p::text, 12, '0'))::uuid, (p * 7919 + n) % 1000, 5 \
             FROM generate_series(0, 2999) n, unnest(ARRAY['EUR', 'JPY']) c, generate_series(1, 100) p; \
             INSERT INTO sales_figures VALUES (3, '2026-03-01 00:00Z', 'EUR', 9, 9, 0, 9, 0); \
             INSERT INTO sales_products \
             SELECT 3, timestamptz '2026-03-01 00:00Z', 'EUR', gen_random_uuid(), 1 + p % 5000, 5 \
             FROM generate_series(1, 50000) p; \
             ANALYZE sales_figures; ANALYZE sales_products; SELECT pg_stat_reset()",
        )
        .await;
    let start = "2026-03-01T00:00:00Z".parse().unwrap();
    let minutes = span(WindowSize::Minute, start, start + TimeDelta::minutes(WINDOWS));
    let answer = replica.summary(minutes).await.unwrap();
    assert_eq!(answer.windows.len(), WINDOWS as usize);
    for figures in answer.windows.iter().flat_map(|window| &window.figures) {
        let quantities: Vec<i64> = figures.best_sellers.iter().map(|best| best.quantity).collect();
        assert_eq!(quantities.len(), 10);
        assert!(quantities.is_sorted_by(|a, b| a >= b), "{quantities:?}");
    }
    let day = span(WindowSize::Day, start, start + TimeDelta::days(1));
    let answer = replica.summary(day).await.unwrap();
    let best = &answer.windows[0].figures[0].best_sellers;
    assert!(best.iter().all(|best| best.quantity == 5_000), "{best:?}");
    // And the same by a list of windows, as emitter and watchers ask.
    stage
        .run("INSERT INTO sales_changes VALUES (3, '2026-03-01 00:00Z')")
        .await;
    stage.all_told().await;
    let client = stage.database.connect().await.unwrap();
    // Ten for each of the windows and currencies.
    let rows = 10 * (2 * WINDOWS + 2);
    wait::until("PostgreSQL to have counted", LIMIT, || async {
        let sql = "SELECT seq_scan, idx_scan, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'sales_products'";
        let row = client.query_one(sql, &[]).await?;
        let (whole, ranges, fetched): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
        anyhow::ensure!(whole == 0, "read as a whole {whole} times");
        anyhow::ensure!(fetched <= rows, "{fetched} rows were read");
        Ok((ranges >= 2 * WINDOWS + 2).then_some(()))
    })
    .await
    .unwrap();
    replica.stop().await;
}
