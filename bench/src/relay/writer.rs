//! What an outbox row costs the transaction that writes it: order-svc's statements by pgbench, with the row and without.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use super::Run;
use crate::report::{Section, number, thousands};
use crate::stats::median;
use crate::ui;

const SCHEMA: &str = concat!(
    include_str!("../../../migrations/order/2026-02-01-000001_orders/up.sql"),
    include_str!("../../../migrations/order/2026-02-01-000002_payments/up.sql"),
    include_str!("../../../migrations/event-store/2026-01-02-000001_events/up.sql"),
    include_str!("../../../migrations/requests/2026-01-03-000001_requests/up.sql"),
    include_str!("../../../migrations/outbox/2026-01-01-000001_outbox/up.sql"),
);

const ORDERS: u32 = 10_000;
const CLIENTS: u32 = 8;

/// The orders that are changed.
const FILL: &str = r#"
INSERT INTO orders (order_id, version, user_id, status, items, total_minor_units, currency, user_email, pay_by, created_at, updated_at)
SELECT md5(n::text)::uuid, 1, gen_random_uuid(), 'pending',
       '[{"product_id": "6f1c0e0a-58f5-4b7b-8a4c-0f6b1c1f7f11", "quantity": 2, "unit_price": 1999},
         {"product_id": "0f6b1c1f-58f5-4b7b-8a4c-6f1c0e0a7f12", "quantity": 1, "unit_price": 4999}]',
       8997, 'EUR', 'anna@example.org', now() + interval '30 days', now(), now()
  FROM generate_series(1, 10000) n"#;

/// The beginning of every command: its request is claimed.
const CLAIM: &str = r"
BEGIN;
INSERT INTO requests (caller, method, request_id, fingerprint)
VALUES ('anna', 'Command', md5(:r::text)::uuid, sha256(:r::text::bytea)) ON CONFLICT DO NOTHING;
";

/// The end: the response is kept.
const COMPLETE: &str = r"
UPDATE requests SET response = sha256(:r::text::bytea) WHERE caller = 'anna' AND method = 'Command' AND request_id = md5(:r::text)::uuid;
COMMIT;
";

/// A change of an order that is there: it is locked and read, its row written as a whole.
const CHANGE: &str = r"
SELECT * FROM orders WHERE order_id = md5(:n::text)::uuid FOR UPDATE \gset o_
UPDATE orders SET version = :o_version + 1, user_id = :o_user_id, status = 'pending', items = :o_items, total_minor_units = :o_total_minor_units,
       currency = 'EUR', user_email = 'anna@example.org', payment_method_id = NULL, pay_by = pay_by, created_at = created_at, updated_at = now(),
       reserved_at = NULL, overdue_at = NULL, paid_at = NULL, payment_id = NULL, payment_brand = NULL, payment_last_four = NULL, confirmed_at = NULL
 WHERE order_id = md5(:n::text)::uuid AND version = :o_version;
";

/// A new order.
const PLACE: &str = r#"
INSERT INTO orders (order_id, version, user_id, status, items, total_minor_units, currency, user_email, pay_by, created_at, updated_at)
VALUES (md5(:r::text)::uuid, 1, md5(:n::text)::uuid, 'pending',
        '[{"product_id": "6f1c0e0a-58f5-4b7b-8a4c-0f6b1c1f7f11", "quantity": 2, "unit_price": 1999}, {"product_id": "0f6b1c1f-58f5-4b7b-8a4c-6f1c0e0a7f12", "quantity": 1, "unit_price": 4999}]',
        8997, 'EUR', 'anna@example.org', now() + interval '30 days', now(), now());
"#;

/// The event of order `ID` at version `VERSION` into its history, as `event_store::append` writes it.
const EVENT: &str = r"
INSERT INTO events (entity_type, entity_id, version, event_id, event_type, schema_version, payload, occurred_at, correlation_id, causation_id, traceparent)
VALUES ('order', ID, VERSION, md5(:r::text || 'e')::uuid, 'order.changed', 1, decode(repeat(md5(:r::text), 12), 'hex'), now(),
        md5(:r::text || 'c')::uuid, md5(:r::text)::uuid, '00-' || md5(:r::text) || '-b7ad6b7169203331-01');
";

/// The same into the outbox, as `outbox::append` writes it.
const OUTBOX: &str = r"
INSERT INTO outbox (event_id, aggregate_type, aggregate_id, aggregate_version, event_type, schema_version, topic, source, content_type, data_schema,
                    correlation_id, causation_id, traceparent, tracestate, metadata, occurred_at, payload)
VALUES (md5(:r::text || 'e')::uuid, 'order', ID, VERSION, 'order.changed', 1, NULL, '/order-svc', 'application/protobuf',
        'shop.order.events.v1.OrderChanged', md5(:r::text || 'c')::uuid, md5(:r::text)::uuid, '00-' || md5(:r::text) || '-b7ad6b7169203331-01', NULL,
        '{}', now(), decode(repeat(md5(:r::text), 12), 'hex'));
";

/// A command, with its outbox row or without.
fn script(work: &str, id: &str, version: &str, outbox: bool) -> String {
    let insert = |text: &str| text.replace("ID", id).replace("VERSION", version);
    let row = if outbox { insert(OUTBOX) } else { String::new() };
    let event = insert(EVENT);
    format!(
        "\\set r random(1, 9223372036854775807)\n\\set n random(1, {ORDERS})\n{CLAIM}{work}{event}{row}{COMPLETE}"
    )
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    tps: f64,
    latency_ms: f64,
}

pub(crate) async fn run(run: &mut Run) -> Result<()> {
    let sizes = run.sizes;
    run.servers.postgres.create_database("writer").await?;
    let client = run.servers.connect("writer").await?;
    client.batch_execute(SCHEMA).await?;
    client.batch_execute(FILL).await?;
    client.batch_execute("VACUUM ANALYZE").await?;
    client.batch_execute("CHECKPOINT").await?;
    let change = |outbox| script(CHANGE, "md5(:n::text)::uuid::text", ":o_version + 1", outbox);
    let place = |outbox| script(PLACE, "md5(:r::text)::uuid::text", "1", outbox);
    let commands = [
        ("a change of an order", [change(false), change(true)]),
        ("a new order", [place(false), place(true)]),
    ];
    let mut outcomes: [[Vec<Outcome>; 2]; 2] = Default::default();
    for round in 1..=sizes.runs {
        for ((name, scripts), outcomes) in commands.iter().zip(&mut outcomes) {
            for (with, (script, outcomes)) in ["without", "with"].iter().zip(scripts.iter().zip(outcomes)) {
                let what = format!("{name}, {with} an outbox row ({round}/{})", sizes.runs);
                let outcome = ui::step(
                    &what,
                    |outcome: &Outcome| format!("{:.0} transactions/s", outcome.tps),
                    pgbench(run, script, sizes.pgbench),
                )
                .await?;
                outcomes.push(outcome);
            }
        }
    }
    let mut section = Section::new("What writers pay")
        .note(format!(
            "order-svc's statements, one round trip each, by pgbench: {CLIENTS} clients, fsync on, {} run(s) of {:?} in turn, medians. \
             The cost is the throughput without an outbox row over that with it.",
            sizes.runs, sizes.pgbench
        ))
        .columns(&["transaction", "outbox row", "transactions/s", "ms", "cost"]);
    let mut costs = Vec::new();
    for ((name, _), [without, with]) in commands.iter().zip(&outcomes) {
        let tps = |outcomes: &[Outcome]| median(outcomes.iter().map(|outcome| outcome.tps));
        let latency = |outcomes: &[Outcome]| median(outcomes.iter().map(|outcome| outcome.latency_ms));
        // Neighbours in time, so that what else the machine does is the same for both.
        let cost = median(
            without
                .iter()
                .zip(with)
                .map(|(without, with)| without.tps / with.tps),
        );
        for (row, outcomes, cost) in [("no", without, None), ("yes", with, cost)] {
            section.row([
                (*name).to_owned(),
                row.to_owned(),
                thousands(tps(outcomes).unwrap_or_default()),
                number(latency(outcomes), 2),
                cost.map_or_else(String::new, |cost| number(Some(cost), 3)),
            ]);
        }
        costs.push(cost);
    }
    run.report.section(section);
    run.report.figure("writer_cost_ratio", costs[0]);
    run.report.figure("writer_cost_new_order_ratio", costs[1]);
    Ok(())
}

async fn pgbench(run: &Run, script: &str, duration: Duration) -> Result<Outcome> {
    let folder = run.servers.folder("pgbench");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("script.sql");
    std::fs::write(&file, script)?;
    let output = Command::new(run.servers.postgres.binaries().join("pgbench"))
        .args([
            "--no-vacuum",
            "--protocol=prepared",
            "--host=127.0.0.1",
            "--username=postgres",
        ])
        .arg(format!("--port={}", run.servers.postgres.port()))
        .arg(format!("--client={CLIENTS}"))
        .arg(format!("--time={}", duration.as_secs()))
        .arg(format!("--file={}", file.display()))
        .arg("writer")
        .kill_on_drop(true)
        .output()
        .await
        .context("pgbench did not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "pgbench failed:\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let figure = |name: &str| {
        let found = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
        found.with_context(|| format!("no {name} in what pgbench says:\n{text}"))
    };
    Ok(Outcome {
        tps: figure("tps = ")?,
        latency_ms: figure("latency average = ")?,
    })
}
