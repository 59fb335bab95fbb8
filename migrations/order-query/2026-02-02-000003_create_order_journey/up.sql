-- Every event about an order, and where it was read: of the order itself, its payments, its reservation and its mails. They come by
-- different topics, so any of them may be here before any other. Nothing in a row depends on when it was written: a rebuild makes the
-- same rows.
CREATE TABLE order_journey (
    order_id     uuid        NOT NULL,
    event_id     uuid        NOT NULL,
    -- The order, the payment, the order again for its reservation, or the event that a mail answers.
    entity_id    uuid        NOT NULL,
    version      bigint      NOT NULL CHECK (version > 0),
    -- When it happened.
    occurred_at  timestamptz NOT NULL,
    kafka_offset bigint      NOT NULL,
    partition    integer     NOT NULL,
    -- Of a mail: its number in shop.notification.events.v1.Template, also where this service does not know it.
    template     integer,
    topic        text        COLLATE "C" NOT NULL,
    event_type   text        NOT NULL,
    -- NULL: it was not traced.
    trace_id     text        COLLATE "C",
    -- The one index: an order's events are found by it, and an event is told once. A rebuild keeps it.
    PRIMARY KEY (order_id, event_id)
);
