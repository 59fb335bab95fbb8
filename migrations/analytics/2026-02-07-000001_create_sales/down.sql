DROP TABLE sales_products, sales_orders, sales_figures, sales_changes, sales_builds;
