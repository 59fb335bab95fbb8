//! Reads on while what was read before is published: on a connection of its own, since what is saved must not wait behind
//! a read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::record::Selection;
use crate::row::Tuple;

/// How many rows to ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FetchSize {
    pub(crate) rows: i64,
    pub(crate) max_rows: i64,
    pub(crate) max_bytes: usize,
}

/// Rows of the first read of a term, and of one after a read that took too long.
const FIRST_FETCH: i64 = 500;

impl FetchSize {
    pub(crate) fn first(config: &Outbox) -> Self {
        let max_rows = config.fetch_rows.into();
        Self {
            rows: FIRST_FETCH.min(max_rows),
            max_rows,
            max_bytes: config.fetch_bytes,
        }
    }

    /// What to ask for after this batch: not much more than fits.
    pub(crate) fn learn(&mut self, batch: &Batch) {
        if batch.bytes > self.max_bytes {
            self.rows = i64::try_from(batch.rows.len()).unwrap_or(FIRST_FETCH).max(1);
        } else if batch.read.full && batch.bytes <= self.max_bytes / 2 {
            self.rows = (self.rows * 2).min(self.max_rows);
        }
    }
}

/// A connection for reading much.
pub(crate) struct Reader {
    db: Database,
    table: TableName,
    selection: Selection,
    /// The id's column, as it stands in SQL.
    id: String,
    log: Log,
    server: String,
}

impl Reader {
    /// Another connection to where `source` is connected to.
    pub(crate) async fn connect(source: &Source, config: &Outbox) -> Result<Self, SourceError> {
        let application = format!("outbox-relay {} reader", source.name);
        let db = Database::connect(&config.connection, &application, config.statement_timeout()).await?;
        Ok(Self {
            log: Log::prepare(&db, config.durability).await?,
            db,
            table: config.table.clone(),
            selection: select_list(&config.layout, &source.checked.types),
            id: crate::sql::identifier(&config.layout.columns.id),
            server: source.server.clone(),
        })
    }

    /// As [`Source::read`]: cheaper for each row, and dearer for the read.
    pub(crate) async fn read(
        &self,
        seen: &Seen,
        max_rows: i64,
        max_bytes: usize,
    ) -> Result<Batch, SourceError> {
        const DOING: &str = "read the outbox";
        let values = ReadValues::literals(seen, max_rows, &self.server);
        let text = read_sql(&self.table, &self.selection.list, &self.id, &values);
        let position = self.log.position(&self.db);
        let (rows, bytes, log_end) = if self.db.is_pooled() {
            // Which costs nothing there.
            let prepared = self.db.prepare(DOING, text).await?;
            let (rows, log_end) = futures::join!(self.db.rows(DOING, &prepared, &[], max_bytes), position);
            let (rows, bytes) = rows?;
            (
                rows.into_iter().map(OutboxRow::Selected).collect(),
                bytes,
                log_end,
            )
        } else {
            let copy = format!("COPY ({text}) TO STDOUT (FORMAT binary)");
            // The position is asked for once the copy has begun, and answered after it.
            let stream = self.db.copy_out(DOING, &copy).await?;
            let (messages, log_end) = futures::join!(self.db.messages(DOING, stream, max_bytes), position);
            let (messages, bytes) = messages?;
            let tuples = messages
                .into_iter()
                .filter_map(|message| Tuple::of_message(message, self.selection.uuids));
            (tuples.map(OutboxRow::Copied).collect(), bytes, log_end)
        };
        Ok(batch(rows, bytes, Some(log_end?), max_rows, max_bytes))
    }
}

/// What the publishing side tells the reading side.
#[derive(Debug, Default)]
struct News {
    /// The fence that is passed.
    passed: Option<u64>,
    /// Ids that died since the last read.
    dead: RangeSet,
}

/// A batch that was read ahead.
struct Fetched {
    /// What it asked for.
    asked: Seen,
    /// The fence that was passed when it began.
    passed: Option<u64>,
    batch: Result<Batch, SourceError>,
}

/// Batches that are read one after the other, each for what the one before it left, until one is not full. At most one
/// waits, while the next is being read.
pub(crate) struct Ahead {
    batches: mpsc::Receiver<Fetched>,
    news: Arc<Mutex<News>>,
    _task: AbortOnDropHandle<()>,
}

impl Ahead {
    pub(crate) fn start(reader: Arc<Reader>, mut seen: Seen, mut size: FetchSize) -> Self {
        let (sender, batches) = mpsc::channel(1);
        let news = Arc::new(Mutex::new(News::default()));
        let told = Arc::clone(&news);
        let task = tokio::spawn(async move {
            loop {
                let passed = {
                    let mut told = lock(&told);
                    seen.give_up(&std::mem::take(&mut told.dead));
                    told.passed
                };
                let asked = seen.clone();
                let batch = reader.read(&seen, size.rows, size.max_bytes).await;
                let mut goes_on = false;
                if let Ok(batch) = &batch {
                    for row in &batch.rows {
                        seen.observe(row.id());
                    }
                    size.learn(batch);
                    goes_on = batch.read.full;
                }
                let fetched = Fetched { asked, passed, batch };
                if sender.send(fetched).await.is_err() || !goes_on {
                    return;
                }
            }
        });
        Self {
            batches,
            news,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// The next batch, and the fence that was passed when its read began. `None` when there is none, or none that asked for
    /// all that is missing now: then reading starts again from there.
    pub(crate) async fn next(&mut self, missing: &Seen) -> Option<(Result<Batch, SourceError>, Option<u64>)> {
        let Fetched { asked, passed, batch } = self.batches.recv().await?;
        let serves = batch.is_err() || asked.serves(missing);
        serves.then_some((batch, passed))
    }

    /// Reads that begin from now on know of this fence.
    pub(crate) fn passed(&self, fence: Option<u64>) {
        lock(&self.news).passed = fence;
    }

    /// Reads that begin from now on leave these out.
    pub(crate) fn died(&self, dead: &RangeSet) {
        let mut news = lock(&self.news);
        for range in dead.iter() {
            news.dead.insert(range);
        }
    }
}

fn lock(news: &Mutex<News>) -> MutexGuard<'_, News> {
    news.lock().unwrap_or_else(PoisonError::into_inner)
}
