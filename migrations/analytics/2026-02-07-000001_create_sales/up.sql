-- The figures of sales, and what they are made of. A rebuild makes these tables anew, so they hold nothing that is not in the topics.
--
-- A swap takes the tables in the order of their names. Whoever reads several in one transaction takes them in that order too, or the
-- two could wait for each other.

-- Which build of these tables this is: who compares it with the one seen before notices a swap.
CREATE TABLE sales_builds (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    build   uuid    NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO sales_builds DEFAULT VALUES;

-- Windows whose figures have changed since an event told of them. Rows are only added and removed, never updated: so whoever adds one
-- waits for nobody, and a row that is seen has its figures with it.
CREATE TABLE sales_changes (
    -- 1 minute, 2 hour, 3 day
    window_size  smallint    NOT NULL CHECK (window_size BETWEEN 1 AND 3),
    window_start timestamptz NOT NULL
);
CREATE INDEX sales_changes_by_window ON sales_changes (window_start, window_size);

-- The figures of a window in one currency: the sums over the orders that were placed in it.
CREATE TABLE sales_figures (
    window_size          smallint    NOT NULL CHECK (window_size BETWEEN 1 AND 3),
    -- A whole minute, hour or day of UTC.
    window_start         timestamptz NOT NULL CHECK (window_start = date_bin(
        CASE window_size WHEN 1 THEN interval '1 minute' WHEN 2 THEN interval '1 hour' ELSE interval '1 day' END,
        window_start, timestamptz '1970-01-01 00:00:00+00')),
    currency_code        text        COLLATE "C" NOT NULL CHECK (currency_code ~ '^[A-Z]{3}$'),
    orders_placed        bigint      NOT NULL DEFAULT 0 CHECK (orders_placed >= 0),
    orders_confirmed     bigint      NOT NULL DEFAULT 0 CHECK (orders_confirmed BETWEEN 0 AND orders_placed),
    orders_cancelled     bigint      NOT NULL DEFAULT 0 CHECK (orders_cancelled BETWEEN 0 AND orders_placed),
    received_minor_units bigint      NOT NULL DEFAULT 0 CHECK (received_minor_units >= 0),
    refunded_minor_units bigint      NOT NULL DEFAULT 0 CHECK (refunded_minor_units BETWEEN 0 AND received_minor_units),
    PRIMARY KEY (window_size, window_start, currency_code)
)
-- The rows of the present are updated by every batch, and no index has a column that changes.
WITH (fillfactor = 60);

-- What is known of an order, as far as figures need it. What each source says is in columns of its own.
CREATE TABLE sales_orders (
    order_id             uuid        PRIMARY KEY,
    -- From events.order. NULL: not heard of there yet.
    placed_at            timestamptz,
    currency_code        text        COLLATE "C",
    -- [{"product_id": uuid, "quantity": n, "revenue_minor_units": n}, …], each product once
    lines                jsonb,
    is_confirmed         boolean     NOT NULL DEFAULT false,
    is_cancelled         boolean     NOT NULL DEFAULT false,
    -- From events.payment. NULL: no money was received.
    paid_currency_code   text        COLLATE "C",
    received_minor_units bigint      NOT NULL DEFAULT 0 CHECK (received_minor_units >= 0),
    refunded_minor_units bigint      NOT NULL DEFAULT 0 CHECK (refunded_minor_units BETWEEN 0 AND received_minor_units),
    CHECK (num_nulls(placed_at, currency_code, lines) IN (0, 3)),
    CHECK (placed_at IS NOT NULL OR NOT (is_confirmed OR is_cancelled)),
    CHECK ((paid_currency_code IS NULL) = (received_minor_units = 0))
) WITH (fillfactor = 70);

-- Pieces of a product in the confirmed orders of a window that were not cancelled. A row may be left that says nothing.
CREATE TABLE sales_products (
    window_size         smallint    NOT NULL,
    window_start        timestamptz NOT NULL,
    currency_code       text        COLLATE "C" NOT NULL,
    product_id          uuid        NOT NULL,
    quantity            bigint      NOT NULL DEFAULT 0 CHECK (quantity >= 0),
    revenue_minor_units bigint      NOT NULL DEFAULT 0 CHECK (revenue_minor_units >= 0),
    PRIMARY KEY (window_size, window_start, currency_code, product_id)
);
-- The best of a window, without reading the others.
CREATE INDEX sales_products_best ON sales_products (window_size, window_start, currency_code, quantity DESC, product_id);
