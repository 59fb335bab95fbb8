-- Orders: each row is its order's snapshot at `version`. The history is in `events`; rebuilding an order from there gives
-- its row. Every rule that the database can hold is here, so that no defect of the service gets past it.
CREATE TABLE orders (
    order_id uuid PRIMARY KEY,
    -- How many events the order has had.
    version bigint NOT NULL CHECK (version > 0),
    user_id uuid NOT NULL,
    status text COLLATE "C" NOT NULL
        CHECK (status IN ('pending', 'paid', 'confirmed', 'shipped', 'delivered', 'cancelled')),
    -- [{"product_id": uuid, "quantity": 1..10000, "unit_price": minor units}, …], 1 to 100 of distinct products.
    items jsonb NOT NULL,
    total_minor_units bigint NOT NULL CHECK (total_minor_units > 0),
    currency text COLLATE "C" NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    user_email text CHECK (length(user_email) BETWEEN 3 AND 254),
    payment_method_id uuid,
    -- Overdue unless paid by then.
    pay_by timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    -- When the last event happened.
    updated_at timestamptz NOT NULL,
    reserved_at timestamptz,
    paid_at timestamptz,
    payment_id uuid,
    payment_brand text CHECK (length(payment_brand) <= 50),
    payment_last_four text CHECK (payment_last_four ~ '^[0-9]{0,4}$'),
    confirmed_at timestamptz,
    shipped_at timestamptz,
    tracking_number text CHECK (length(tracking_number) <= 100),
    carrier text CHECK (length(carrier) <= 100),
    delivered_at timestamptz,
    cancelled_at timestamptz,
    cancelled_by text COLLATE "C"
        CHECK (cancelled_by IN ('user', 'out_of_stock', 'not_paid_in_time', 'payment_failed')),
    cancel_reason text CHECK (length(cancel_reason) <= 500),

    CONSTRAINT orders_items CHECK (
        CASE WHEN jsonb_typeof(items) = 'array' THEN jsonb_array_length(items) BETWEEN 1 AND 100 ELSE false END
        AND NOT jsonb_path_exists(items, '$[*] ? (@.quantity < 1 || @.quantity > 10000 || @.unit_price < 1)')
        AND NOT jsonb_path_exists(items, '$[*] ? (!exists(@.product_id) || !exists(@.quantity) || !exists(@.unit_price))')
    ),
    CONSTRAINT orders_pay_by CHECK (pay_by > created_at),
    -- What belongs together is there together.
    CONSTRAINT orders_payment CHECK (num_nulls(paid_at, payment_id, payment_brand, payment_last_four) IN (0, 4)),
    CONSTRAINT orders_shipment CHECK (num_nulls(shipped_at, tracking_number, carrier) IN (0, 3)),
    CONSTRAINT orders_cancellation CHECK (num_nulls(cancelled_at, cancelled_by, cancel_reason) IN (0, 3)),
    -- The status says what has happened, and what has not.
    CONSTRAINT orders_confirmed CHECK (
        (confirmed_at IS NULL) = (reserved_at IS NULL OR paid_at IS NULL)
    ),
    CONSTRAINT orders_status CHECK (
        CASE status
            WHEN 'pending' THEN num_nonnulls(paid_at, shipped_at, delivered_at, cancelled_at) = 0
            WHEN 'paid' THEN paid_at IS NOT NULL AND num_nonnulls(reserved_at, shipped_at, delivered_at, cancelled_at) = 0
            WHEN 'confirmed' THEN confirmed_at IS NOT NULL AND num_nonnulls(shipped_at, delivered_at, cancelled_at) = 0
            WHEN 'shipped' THEN num_nulls(confirmed_at, shipped_at) = 0 AND num_nonnulls(delivered_at, cancelled_at) = 0
            WHEN 'delivered' THEN num_nulls(confirmed_at, shipped_at, delivered_at) = 0 AND cancelled_at IS NULL
            ELSE cancelled_at IS NOT NULL AND num_nonnulls(shipped_at, delivered_at) = 0
        END
    )
)
-- Rows change a few times and no index has a column that changes: leave room for updates in place.
WITH (fillfactor = 80);

-- What was ordered stays what it was, versions only rise, and orders are for ever.
CREATE FUNCTION orders_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        RAISE EXCEPTION 'orders are for ever: % refused', TG_OP USING ERRCODE = 'restrict_violation';
    END IF;
    IF (NEW.order_id, NEW.user_id, NEW.items, NEW.total_minor_units, NEW.currency, NEW.pay_by, NEW.created_at)
        IS DISTINCT FROM
       (OLD.order_id, OLD.user_id, OLD.items, OLD.total_minor_units, OLD.currency, OLD.pay_by, OLD.created_at)
       OR (NEW.user_email, NEW.payment_method_id) IS DISTINCT FROM (OLD.user_email, OLD.payment_method_id)
       OR NEW.version <= OLD.version
       OR OLD.status IN ('delivered', 'cancelled')
    THEN
        RAISE EXCEPTION 'order %: this change is refused', OLD.order_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER orders_guard BEFORE UPDATE ON orders
    FOR EACH ROW EXECUTE FUNCTION orders_refuse_change();
CREATE TRIGGER orders_for_ever BEFORE DELETE OR TRUNCATE ON orders
    FOR EACH STATEMENT EXECUTE FUNCTION orders_refuse_change();
