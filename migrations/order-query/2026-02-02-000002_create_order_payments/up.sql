-- The payments of orders, as events.payment tells of them. A payment may be here before its order's view, and the other way round.
CREATE TABLE order_payments (
    payment_id         uuid        PRIMARY KEY,
    order_id           uuid        NOT NULL,
    -- 1 received, 2 failed, 3 refunded
    status             smallint    NOT NULL CHECK (status BETWEEN 1 AND 3),
    amount_minor_units bigint      NOT NULL,
    currency_code      text        NOT NULL,
    -- Empty when the method is not known.
    brand              text        NOT NULL,
    last_four          text        NOT NULL,
    -- Its number in shop.payment.events.v1.FailureReason, also where this service does not know it.
    failure_reason     integer     CHECK ((failure_reason IS NOT NULL) = (status = 2)),
    another_try        boolean     CHECK ((another_try IS NOT NULL) = (status = 2)),
    -- The version of the payment that this row has reached.
    version            bigint      NOT NULL CHECK (version > 0),
    -- When the first event seen happened, by which an order's payments are told one after the other.
    first_event_at     timestamptz NOT NULL,
    -- When the last event seen happened.
    updated_at         timestamptz NOT NULL
) WITH (fillfactor = 80);

CREATE INDEX order_payments_by_order ON order_payments (order_id);

-- The payment by which the order was paid, as events.order tells it.
ALTER TABLE order_views ADD COLUMN payment_id uuid;
