-- What payment-svc knows and does. Every rule that the database can hold is here, so that no defect of the service gets past it.

-- Cards that the provider keeps for our users. Never a card number: the provider's token, and what people recognise a card by.
CREATE TABLE payment_methods (
    payment_method_id uuid PRIMARY KEY,
    user_id uuid NOT NULL,
    -- The provider's. It leaves this database towards the provider only.
    provider_token text COLLATE "C" NOT NULL UNIQUE CHECK (length(provider_token) BETWEEN 1 AND 255),
    brand text NOT NULL CHECK (length(brand) BETWEEN 1 AND 50),
    last_four text COLLATE "C" NOT NULL CHECK (last_four ~ '^[0-9]{4}$'),
    expiry_month smallint NOT NULL CHECK (expiry_month BETWEEN 1 AND 12),
    expiry_year smallint NOT NULL CHECK (expiry_year BETWEEN 2000 AND 9999),
    created_at timestamptz NOT NULL,
    -- So that payments can name a method together with whose it is.
    UNIQUE (payment_method_id, user_id)
);

-- What events.order has told of each order. Whoever decides anything about an order locks its row here first.
CREATE TABLE known_orders (
    order_id uuid PRIMARY KEY,
    user_id uuid NOT NULL,
    total_minor_units bigint NOT NULL CHECK (total_minor_units > 0),
    currency text COLLATE "C" NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    -- What the order was placed with; not necessarily a method that exists.
    payment_method_id uuid,
    -- Its stock is held.
    reserved boolean NOT NULL,
    -- No further payment of it is started.
    closed boolean NOT NULL,
    cancelled boolean NOT NULL,
    -- The order's version up to which this is known.
    version bigint NOT NULL CHECK (version > 0),
    CONSTRAINT known_orders_closed CHECK (closed OR NOT cancelled),
    -- So that a payment can only be of its order's user, and of the whole amount.
    UNIQUE (order_id, user_id, total_minor_units, currency)
)
WITH (fillfactor = 80);

-- One attempt each to pay an order, written before the provider is asked for anything. Each row is its payment's snapshot at
-- `version`; the history is in `events`.
CREATE TABLE payments (
    payment_id uuid PRIMARY KEY,
    -- How many events the payment has had. None while it is pending.
    version bigint NOT NULL,
    order_id uuid NOT NULL,
    user_id uuid NOT NULL,
    amount_minor_units bigint NOT NULL,
    currency text COLLATE "C" NOT NULL,
    payment_method_id uuid,
    brand text CHECK (length(brand) BETWEEN 1 AND 50),
    last_four text COLLATE "C" CHECK (last_four ~ '^[0-9]{4}$'),
    status text COLLATE "C" NOT NULL,
    -- The provider's id of the charge. One at most is ever confirmed for a payment: this one.
    intent text COLLATE "C" UNIQUE CHECK (length(intent) BETWEEN 1 AND 255),
    -- The provider's id of the refund.
    refund text COLLATE "C" UNIQUE CHECK (length(refund) BETWEEN 1 AND 255),
    failure_reason text COLLATE "C" CHECK (failure_reason IN (
        'declined', 'insufficient_funds', 'expired_card', 'incorrect_card_details', 'card_blocked', 'authentication_required',
        'unknown_payment_method', 'not_supported', 'order_cancelled', 'not_paid_in_time')),
    another_try boolean,
    created_at timestamptz NOT NULL,
    -- When the status last changed.
    updated_at timestamptz NOT NULL CHECK (updated_at >= created_at),

    -- The work that is left. When the next step is due; whoever takes it moves this on, as a lease.
    next_step_at timestamptz,
    -- Part of the keys by which the provider recognises repeats. Stored before the call.
    tries integer NOT NULL CHECK (tries > 0),
    -- How often nothing could be learnt.
    delays integer NOT NULL CHECK (delays >= 0),
    -- The request or event that caused what happens next, and its trace.
    causation_id uuid NOT NULL,
    traceparent text,
    tracestate text,

    CONSTRAINT payments_order FOREIGN KEY (order_id, user_id, amount_minor_units, currency)
        REFERENCES known_orders (order_id, user_id, total_minor_units, currency),
    CONSTRAINT payments_own_method FOREIGN KEY (payment_method_id, user_id)
        REFERENCES payment_methods (payment_method_id, user_id),
    CONSTRAINT payments_method CHECK (num_nulls(payment_method_id, brand, last_four) IN (0, 3)),
    CONSTRAINT payments_failure CHECK (num_nulls(failure_reason, another_try) IN (0, 2)),
    -- The status says what has happened, what has not, and whether anything is left to do.
    CONSTRAINT payments_status CHECK (
        CASE status
            WHEN 'pending' THEN version = 0 AND num_nulls(payment_method_id, next_step_at) = 0
                AND num_nonnulls(refund, failure_reason) = 0
            WHEN 'received' THEN version = 1 AND num_nulls(payment_method_id, intent) = 0
                AND num_nonnulls(refund, failure_reason, next_step_at) = 0
            WHEN 'failed' THEN version = 1 AND failure_reason IS NOT NULL AND num_nonnulls(refund, next_step_at) = 0
            WHEN 'refund_pending' THEN version = 1 AND num_nulls(payment_method_id, intent, next_step_at) = 0
                AND num_nonnulls(refund, failure_reason) = 0
            WHEN 'refunded' THEN version = 2 AND num_nulls(payment_method_id, intent, refund) = 0
                AND num_nonnulls(failure_reason, next_step_at) = 0
            ELSE false
        END
    )
)
WITH (fillfactor = 80);

-- At most one payment of an order that has not failed, for ever: so at most one charge.
CREATE UNIQUE INDEX payments_one_per_order ON payments (order_id) WHERE status <> 'failed';

-- The work that is left, in the order in which it is due.
CREATE INDEX payments_due ON payments (next_step_at) WHERE next_step_at IS NOT NULL;

-- So many seconds from now, by this database's clock alone: replicas' clocks may differ.
CREATE FUNCTION due_in(seconds double precision) RETURNS timestamptz LANGUAGE sql VOLATILE STRICT
    AS 'SELECT clock_timestamp() + make_interval(secs => seconds)';

CREATE FUNCTION payments_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% are for ever: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END
$$;

-- Who pays what for which order and how stays what it was; a payment only goes forward.
CREATE FUNCTION payments_guard_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.payment_id, NEW.order_id, NEW.user_id, NEW.amount_minor_units, NEW.currency, NEW.created_at)
        IS DISTINCT FROM
       (OLD.payment_id, OLD.order_id, OLD.user_id, OLD.amount_minor_units, OLD.currency, OLD.created_at)
       OR (NEW.payment_method_id, NEW.brand, NEW.last_four)
        IS DISTINCT FROM (OLD.payment_method_id, OLD.brand, OLD.last_four)
       OR (OLD.intent IS NOT NULL AND NEW.intent IS DISTINCT FROM OLD.intent)
       OR (OLD.status <> 'pending' AND NEW.intent IS DISTINCT FROM OLD.intent)
       OR NEW.tries < OLD.tries
       -- In parentheses: PL/pgSQL would take the first THEN for its own.
       OR NOT (CASE OLD.status
            WHEN 'pending' THEN NEW.status IN ('pending', 'received', 'failed', 'refund_pending')
            WHEN 'received' THEN NEW.status = 'refund_pending'
            WHEN 'refund_pending' THEN NEW.status IN ('refund_pending', 'refunded')
            ELSE false
        END)
    THEN
        RAISE EXCEPTION 'payment %: this change is refused', OLD.payment_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE FUNCTION known_orders_guard_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.order_id, NEW.user_id, NEW.total_minor_units, NEW.currency, NEW.payment_method_id)
        IS DISTINCT FROM
       (OLD.order_id, OLD.user_id, OLD.total_minor_units, OLD.currency, OLD.payment_method_id)
       OR NEW.version < OLD.version
       OR (OLD.reserved AND NOT NEW.reserved)
       OR (OLD.closed AND NOT NEW.closed)
       OR (OLD.cancelled AND NOT NEW.cancelled)
    THEN
        RAISE EXCEPTION 'order %: this change is refused', OLD.order_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER payments_guard BEFORE UPDATE ON payments
    FOR EACH ROW EXECUTE FUNCTION payments_guard_change();
CREATE TRIGGER payments_for_ever BEFORE DELETE OR TRUNCATE ON payments
    FOR EACH STATEMENT EXECUTE FUNCTION payments_refuse_change();
CREATE TRIGGER known_orders_guard BEFORE UPDATE ON known_orders
    FOR EACH ROW EXECUTE FUNCTION known_orders_guard_change();
CREATE TRIGGER known_orders_for_ever BEFORE DELETE OR TRUNCATE ON known_orders
    FOR EACH STATEMENT EXECUTE FUNCTION payments_refuse_change();
CREATE TRIGGER payment_methods_for_ever BEFORE UPDATE OR DELETE OR TRUNCATE ON payment_methods
    FOR EACH STATEMENT EXECUTE FUNCTION payments_refuse_change();
