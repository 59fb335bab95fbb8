-- The read model of orders. What each source says is in columns of its own; these are from events.order.
CREATE TABLE order_views (
    order_id          uuid        PRIMARY KEY,
    user_id           uuid        NOT NULL,
    -- 1 pending, 2 paid, 3 confirmed, 4 shipped, 5 delivered, 6 cancelled
    status            smallint    NOT NULL CHECK (status BETWEEN 1 AND 6),
    -- [{"product_id": uuid, "quantity": n, "unit_price_minor_units": n}, …]
    items             jsonb       NOT NULL,
    total_minor_units bigint      NOT NULL,
    currency_code     text        NOT NULL,
    -- The version of the order that this row has reached.
    order_version     bigint      NOT NULL CHECK (order_version > 0),
    placed_at         timestamptz NOT NULL,
    -- When the last event seen happened.
    updated_at        timestamptz NOT NULL,
    pay_by            timestamptz,
    cancel_reason     text        NOT NULL,
    tracking_number   text        NOT NULL,
    carrier           text        NOT NULL
) WITH (fillfactor = 80);

-- A user's orders, newest first: with and without a status.
CREATE INDEX order_views_by_user ON order_views (user_id, placed_at, order_id);
CREATE INDEX order_views_by_user_and_status ON order_views (user_id, status, placed_at, order_id);
