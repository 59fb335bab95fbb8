-- How far each consumer has come with each entity: the version mark. It advances in the transaction of the effect, so
-- that version <= mark recognises a repeat, and version > mark + 1 a gap.
CREATE TABLE consumer_marks (
    consumer  text   COLLATE "C" NOT NULL,
    topic     text   COLLATE "C" NOT NULL,
    entity_id text   COLLATE "C" NOT NULL,
    version   bigint NOT NULL CHECK (version > 0),
    -- The event that carried this version: the same version in another event is an alarm.
    event_id  uuid   NOT NULL,
    PRIMARY KEY (consumer, topic, entity_id)
)
-- Marks are updated for ever and no index has a column that changes: leave room for updates in place.
WITH (fillfactor = 80);
