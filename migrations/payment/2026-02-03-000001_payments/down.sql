DROP TABLE payments, known_orders, payment_methods;
DROP FUNCTION payments_refuse_change(), payments_guard_change(), known_orders_guard_change(), due_in(double precision);
