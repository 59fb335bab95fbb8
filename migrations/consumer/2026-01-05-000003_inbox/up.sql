-- Events of sources that do not count versions, by their ids: those that took effect. Their marks count them.
CREATE TABLE consumer_inbox (
    consumer   text        COLLATE "C" NOT NULL,
    generation integer     NOT NULL CHECK (generation > 0),
    topic      text        COLLATE "C" NOT NULL,
    event_id   uuid        NOT NULL,
    seen_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (consumer, generation, topic, event_id)
);
-- What is old enough to go.
CREATE INDEX consumer_inbox_by_age ON consumer_inbox (consumer, seen_at);
CREATE INDEX parked_records_settled ON parked_records (consumer, settled_at)
    WHERE state IN ('replayed', 'repeated', 'superseded');

-- What was decided goes with the record that it was about.
ALTER TABLE parked_audit
    DROP CONSTRAINT parked_audit_parked_id_fkey,
    ADD CONSTRAINT parked_audit_parked_id_fkey FOREIGN KEY (parked_id) REFERENCES parked_records ON DELETE CASCADE;
