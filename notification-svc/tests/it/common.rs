//! A database, topics, a mail server, and replicas of notification-svc on them.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use contracts::catalogue::{order as orders, payment, user};
use contracts::shop::common::v1::Money;
use contracts::shop::order::events::v1 as order_events;
use contracts::shop::payment::events::v1 as payment_events;
use contracts::shop::user::events::v1 as user_events;
use envelope::Envelope;
use local_stack::process::Builder;
use local_stack::smtp::{self, Mail, Smtp, Tls};
use local_stack::testing::events::{Topic, envelope};
use local_stack::testing::{self, Database, Folder, Process};
use local_stack::wait;
use prost::Message;
use service::config::{Sources, parse};
use service::shutdown::BoxError;
use uuid::Uuid;

/// How long a test waits for what must happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The sender of every mail.
pub(crate) const FROM: &str = "Shop <shop@shop.example>";

pub(crate) struct Stage {
    pub(crate) database: Database,
    pub(crate) sql: tokio_postgres::Client,
    pub(crate) orders: Topic,
    pub(crate) payments: Topic,
    pub(crate) users: Topic,
    pub(crate) smtp: Smtp,
    tls: Tls,
    group: String,
    pub(crate) folder: Folder,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Self::with(Tls::Implicit).await
    }

    pub(crate) async fn with(tls: Tls) -> Self {
        let folder = Folder::create("notification-svc");
        let brokers = testing::kafka_brokers();
        let (database, smtp, orders, payments, users) = tokio::join!(
            database(),
            Smtp::start(folder.path(), tls),
            Topic::create(&brokers, "events.order", 3),
            Topic::create(&brokers, "events.payment", 3),
            Topic::create(&brokers, "events.user", 3),
        );
        Self {
            sql: database.connect().await.expect("connected"),
            database,
            smtp: smtp.expect("a mail server"),
            orders: orders.expect("a topic"),
            payments: payments.expect("a topic"),
            users: users.expect("a topic"),
            tls,
            group: testing::unique("notification-svc"),
            folder,
        }
    }

    /// A replica as a process of its own.
    pub(crate) fn process(&self, instance: &str) -> Builder {
        let tls = match self.tls {
            Tls::Implicit => "implicit",
            Tls::StartTls => "starttls",
        };
        [
            ("database.url", self.database.url().as_str()),
            ("database.pool_size", "8"),
            ("database.acquire_timeout", "5s"),
            ("kafka.brokers", &testing::kafka_brokers()),
            ("consumer.order_topic", self.orders.name()),
            ("consumer.payment_topic", self.payments.name()),
            ("consumer.user_topic", self.users.name()),
            ("consumer.group", &self.group),
            ("smtp.host", "localhost"),
            ("smtp.port", &self.smtp.port().to_string()),
            ("smtp.tls", tls),
            ("smtp.ca_file", &self.smtp.ca_file().to_string_lossy()),
            ("smtp.user", smtp::USER),
            ("smtp.password", smtp::PASSWORD),
            ("smtp.from", FROM),
            ("smtp.timeout", "1s"),
            ("smtp.data_timeout", "1s"),
            ("mails.lease", "4s"),
            ("mails.poll", "50ms"),
            ("mails.retry_first", "100ms"),
            ("mails.retry_longest", "400ms"),
            ("mails.drain", "2s"),
            ("grpc.shutdown_wait", "0s"),
        ]
        .into_iter()
        .fold(
            Process::builder("notification-svc", self.folder.path()).instance(instance),
            |builder, (key, value)| builder.set(key, value),
        )
    }

    /// A running replica.
    pub(crate) async fn start(&self, instance: &str) -> Process {
        let mut process = self.process(instance).start().await.expect("started");
        process.ready().await.expect("ready");
        process
    }

    /// A replica that dies at a point.
    pub(crate) async fn start_to_die(&self, instance: &str, point: &str) -> Process {
        self.process(instance)
            .env("FAILPOINTS", format!("{point}=return"))
            .start()
            .await
            .expect("started")
    }

    /// Where a user can be reached, from now on.
    pub(crate) async fn tell_address(&self, order: &Order, email: &str, first_name: &str) -> Envelope {
        let version = order.user_version.fetch_add(1, Ordering::SeqCst) + 1;
        let user_id = order.user.to_string();
        let (event_type, payload) = if version == 1 {
            let created = user_events::UserCreated {
                user_id: user_id.clone(),
                email: email.into(),
                first_name: first_name.into(),
                last_name: "Lastname".into(),
                created_at: None,
            };
            (user::CREATED, created.encode_to_vec())
        } else {
            let updated = user_events::UserUpdated {
                user_id: user_id.clone(),
                email: email.into(),
                first_name: first_name.into(),
                last_name: "Lastname".into(),
                updated_at: None,
            };
            (user::UPDATED, updated.encode_to_vec())
        };
        let envelope = envelope(user::ENTITY_TYPE, &user_id, version, event_type);
        self.users.publish(&envelope, &payload).await.expect("published");
        envelope
    }

    /// The next event of an order.
    pub(crate) async fn tell(&self, order: &Order, event_type: &str, payload: &impl Message) -> Envelope {
        let version = order.version.fetch_add(1, Ordering::SeqCst) + 1;
        let mut envelope = envelope(orders::ENTITY_TYPE, &order.id.to_string(), version, event_type);
        envelope.traceparent = Some(traceparent(order));
        self.orders
            .publish(&envelope, &payload.encode_to_vec())
            .await
            .expect("published");
        envelope
    }

    pub(crate) async fn tell_placed(&self, order: &Order, email: Option<&str>) -> Envelope {
        self.tell(order, orders::PLACED, &order.placed(email)).await
    }

    pub(crate) async fn tell_confirmed(&self, order: &Order) -> Envelope {
        let confirmed = order_events::OrderConfirmed {
            order_id: order.id.to_string(),
            ..Default::default()
        };
        self.tell(order, orders::CONFIRMED, &confirmed).await
    }

    pub(crate) async fn tell_refunded(&self, order: &Order) -> Envelope {
        let payment_id = Uuid::new_v4().to_string();
        let refunded = payment_events::PaymentRefunded {
            payment_id: payment_id.clone(),
            order_id: order.id.to_string(),
            amount: Some(euros(1299)),
            payment_method: Some(payment_events::PaymentMethodSummary {
                brand: "visa".into(),
                last_four: "4242".into(),
            }),
            ..Default::default()
        };
        // As if it had been received before, of which nothing is heard here.
        let received = envelope(payment::ENTITY_TYPE, &payment_id, 1, payment::RECEIVED);
        let envelope = envelope(payment::ENTITY_TYPE, &payment_id, 2, payment::REFUNDED);
        self.payments.publish(&received, b"").await.expect("published");
        self.payments
            .publish(&envelope, &refunded.encode_to_vec())
            .await
            .expect("published");
        envelope
    }

    /// Waits until a mail is in a state.
    pub(crate) async fn until(&self, mail: Uuid, state: &str) {
        let query = "SELECT state FROM mails WHERE notification_id = $1";
        let reached = wait::until(&format!("mail {mail} is {state}"), LIMIT, || async {
            let row = self.sql.query_opt(query, &[&mail]).await?;
            Ok(row.filter(|row| row.get::<_, &str>(0) == state).map(|_| ()))
        })
        .await;
        if let Err(error) = reached {
            let query = "SELECT state || ', ' || coalesce(trouble, 'no trouble') FROM mails WHERE notification_id = $1";
            let row = self.sql.query_opt(query, &[&mail]).await.expect("answered");
            panic!("{error:#}: it is {:?}", row.map(|row| row.get::<_, String>(0)));
        }
    }

    /// Waits until a query gives this number.
    pub(crate) async fn until_count(&self, query: &str, expected: i64) {
        wait::until(&format!("{query} gives {expected}"), LIMIT, || async {
            let row = self.sql.query_one(query, &[]).await?;
            Ok((row.get::<_, i64>(0) == expected).then_some(()))
        })
        .await
        .expect(query);
    }

    pub(crate) async fn trouble(&self, mail: Uuid) -> String {
        let query = "SELECT coalesce(trouble, '') FROM mails WHERE notification_id = $1";
        self.sql.query_one(query, &[&mail]).await.expect("a mail").get(0)
    }

    /// What the mail server has taken that answers an event.
    pub(crate) fn taken(&self, mail: Uuid) -> Vec<Mail> {
        let mut taken = self.smtp.received().expect("mails");
        taken.retain(|taken| taken.header("message-id") == format!("<{mail}@shop.example>"));
        taken
    }

    /// The one mail that answers an event.
    #[track_caller]
    pub(crate) fn the_mail(&self, mail: Uuid) -> Mail {
        let [mail]: [Mail; 1] = self
            .taken(mail)
            .try_into()
            .unwrap_or_else(|mails| panic!("not one: {mails:?}"));
        mail
    }

    /// How often notification.sent of a mail is in the outbox, all of them version 1.
    pub(crate) async fn told_sent(&self, mail: Uuid) -> i64 {
        let query = "SELECT count(*) FROM outbox WHERE aggregate_type = 'notification' AND aggregate_id = $1
                     AND event_type = 'notification.sent' AND aggregate_version = 1 AND causation_id::text = $1";
        let row = self.sql.query_one(query, &[&mail.to_string()]).await;
        row.expect("answered").get(0)
    }

    /// Runs a command; its output and whether it succeeded.
    pub(crate) fn command(&self, args: &[&str]) -> (bool, String, String) {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_notification-svc"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NOTIFICATION_SVC_")) {
            command.env_remove(name);
        }
        for (name, value) in [
            ("DATABASE__URL", self.database.url().as_str()),
            ("KAFKA__BROKERS", &testing::kafka_brokers()),
            ("SMTP__HOST", "localhost"),
            ("SMTP__FROM", FROM),
        ] {
            command.env(format!("NOTIFICATION_SVC_{name}"), value);
        }
        let output = command.args(args).output().expect("run");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (output.status.success(), text(output.stdout), text(output.stderr))
    }

    /// The history and the outbox fit what was sent.
    pub(crate) fn is_right(&self) {
        let (sound, out, err) = self.command(&["verify"]);
        assert!(sound, "{out}{err}");
    }
}

pub(crate) async fn database() -> Database {
    Database::create("notification-svc 2026-02-05-000001 parking", migrate).await
}

async fn migrate(url: String) -> Result<(), BoxError> {
    let toml = format!("database.url = \"{url}\"");
    let database = parse(Sources::new("X_").toml(&toml), service::config::Database::read).expect("valid");
    notification_svc::migrate(&database).await?;
    Ok(())
}

/// Ends as if killed.
pub(crate) async fn dies(process: &mut Process, point: &str) {
    let status = process
        .wait(LIMIT)
        .await
        .unwrap_or_else(|error| panic!("{point}: {error:#}"));
    assert!(!status.success(), "{point}: {status}");
}

/// An order, whose it is, and how many events both have had.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) id: Uuid,
    pub(crate) user: Uuid,
    version: AtomicI64,
    user_version: AtomicI64,
}

impl Order {
    pub(crate) fn new() -> Self {
        Self {
            id: Uuid::new_v4(),
            user: Uuid::new_v4(),
            version: AtomicI64::new(0),
            user_version: AtomicI64::new(0),
        }
    }

    /// 2 × 5.00 and 1 × 2.99 EUR.
    pub(crate) fn placed(&self, email: Option<&str>) -> order_events::OrderPlaced {
        let line = |quantity, unit_price_minor_units| order_events::OrderLine {
            product_id: Uuid::from_u128(quantity as u128).to_string(),
            quantity,
            unit_price_minor_units,
        };
        order_events::OrderPlaced {
            order_id: self.id.to_string(),
            user_id: self.user.to_string(),
            items: vec![line(2, 500), line(1, 299)],
            total: Some(euros(1299)),
            user_email: email.map(str::to_owned),
            ..Default::default()
        }
    }
}

pub(crate) fn euros(minor_units: i64) -> Money {
    Money {
        minor_units,
        currency_code: "EUR".into(),
    }
}

/// The trace that an order's events belong to: its id.
pub(crate) fn traceparent(order: &Order) -> String {
    format!("00-{}-b7ad6b7169203331-01", order.id.simple())
}
